"""Numbers of masks and scores, with their intervals. Open it to add a number."""
