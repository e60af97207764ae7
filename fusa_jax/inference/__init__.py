"""Uses trained runs: predicts, exports bundles, writes viewer pages. To add a way to deploy, edit this package."""
