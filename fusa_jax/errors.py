"""What a user can mend is raised as a UserError; launch.py turns it into one line and exit code 2."""


class UserError(ValueError):
  """Bad input from outside: a file, a flag, a config. The text says what is wrong, where, and what to do.

  Several findings of one kind (all bad files of a cohort) are given together, a line each.
  """
