"""A run's folder: its config, checkpoints, logs, operating point, results, figures and report."""
