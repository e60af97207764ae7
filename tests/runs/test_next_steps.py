"""The last lines of a command name files that exist."""

import logging

from fusa_jax.runs import next_steps


def test_a_picture_is_named_only_if_it_was_drawn(tmp_path, caplog):
  """Labels of patients and cross-validations have none."""
  caplog.set_level(logging.INFO)
  next_steps.after_test(tmp_path, tmp_path / 'test')
  assert 'report:' in caplog.text and 'picture:' not in caplog.text
  (tmp_path / 'test' / 'figures').mkdir(parents=True)
  (tmp_path / 'test' / 'figures' / 'overview.png').touch()
  next_steps.after_test(tmp_path, tmp_path / 'test')
  assert f'{tmp_path}/test/figures/overview.png' in caplog.text
