"""Finds configs/, data/ and the cache folder; only this module knows where they are.

In the repository they are next to launch.py. In an installed package they are in fusa_jax/home, because packages with
these names at the top of site-packages would shadow those of others. This module adds HOME to sys.path: import it
before configs or data.
"""

import os
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
HOME = PACKAGE.parent if (PACKAGE.parent / 'pyproject.toml').exists() else PACKAGE / 'home'
CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'fusa_jax'
if str(HOME) not in sys.path:
  sys.path.insert(0, str(HOME))
