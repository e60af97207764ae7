"""The paper's Table I or II under one protocol: a study (benchmarks/study.py) of every model of it.

  python -m benchmarks.tables --config=configs/cls.py --config.data.raw_dir=FOLDER_OF_SCANS --seeds=0,1,2
  python -m benchmarks.tables --config=configs/seg.py                               (no data named: the demo's size)

Flags, files and what happens when it is stopped are the study's.
"""

from absl import flags
from ml_collections import config_flags

from benchmarks import study
from fusa_jax.runs import arguments
from fusa_jax.system import program
from fusa_jax.system.errors import UserError

# A table trains five or seven models: fewer than the demo of segmentation alone takes.
_DEMO_STEPS = {'classification': 1000, 'segmentation': 900}


def main(_):
  program.start_logging()
  if flags.FLAGS.models is not None:
    raise UserError("--models: a table has all of the paper's; python -m benchmarks.study takes some")
  config, name, _ = arguments.named_experiment()
  if '-demo' in name and 'train.steps' not in config_flags.get_override_values(flags.FLAGS['config']):
    config.train.steps = _DEMO_STEPS[config.task]
  study.run(config, flags.FLAGS.workdir or f'runs/tables/{name}')


if __name__ == '__main__':
  study.define_flags()
  arguments.start(main)
