"""Trained runs at work: predictions, bundles to pass on, pages to look at. Open it to add a way to deploy."""
