"""From a prepared dataset to a trained and evaluated run. Open it to add an augmentation."""
