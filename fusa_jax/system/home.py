"""Where configs/ and data/ lie: the one place that knows.

At the top of the repository they stand beside launch.py. Installed, they lie in fusa_jax/home: at the top of
site-packages, packages of these names would shadow other people's. Who imports them imports this module first, which
puts HOME on the path of modules.
"""

import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
HOME = PACKAGE.parent if (PACKAGE.parent / 'pyproject.toml').exists() else PACKAGE / 'home'
if str(HOME) not in sys.path:
  sys.path.insert(0, str(HOME))
