"""The command line from a copy of the repository; `pip install .` gives the same as `fusa-jax`.

python launch.py --config=configs/seg.py --config.data.raw_dir=FOLDER_OF_SCANS

`python launch.py --help` lists the modes and their flags. On several hosts, the same command on each is one run:
docs/pods.md.
"""

from fusa_jax import cli

if __name__ == '__main__':
  cli.start()
