"""Makes the paper's Table I or II under one protocol: a study (benchmarks/study.py) with all models of the table.

  python -m benchmarks.tables --config=configs/cls.py --config.data.raw_dir=FOLDER_OF_SCANS --seeds=0,1,2
  python -m benchmarks.tables --config=configs/seg.py                               (without data: the demo's size)

Flags, files and resume work as in a study.
"""

from absl import flags
from ml_collections import config_flags

from benchmarks import study
from fusa_jax.runs import arguments
from fusa_jax.system import program
from fusa_jax.system.errors import UserError

# Fewer steps than the segmentation demo has, because a table trains five or seven models.
_DEMO_STEPS = {'classification': 1000, 'segmentation': 900}


def main(_):
  program.start_logging()
  if flags.FLAGS.models is not None:
    raise UserError(
      "--models: a table always has all of the paper's models; leave it out, or use python -m benchmarks.study"
    )
  config, name, _ = arguments.named_experiment()
  if '-demo' in name and 'train.steps' not in config_flags.get_override_values(flags.FLAGS['config']):
    config.train.steps = _DEMO_STEPS[config.task]
  study.run(config, flags.FLAGS.workdir or f'runs/tables/{name}')


if __name__ == '__main__':
  study.define_flags()
  arguments.start(main)
