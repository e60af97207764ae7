"""Runs launch.py as a user does."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def launch(*arguments, home=None, folder=ROOT):
  environment = os.environ | ({'HOME': str(home)} if home else {})
  command = [sys.executable, str(ROOT / 'launch.py'), *arguments]
  return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
