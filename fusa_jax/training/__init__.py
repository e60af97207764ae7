"""Trains and evaluates a run on a prepared dataset. To add an augmentation, edit this package."""
