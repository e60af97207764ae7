"""Metrics of masks and scores, with confidence intervals. A new metric belongs here."""
