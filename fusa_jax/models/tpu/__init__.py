"""Versions of layers for TPUs."""
