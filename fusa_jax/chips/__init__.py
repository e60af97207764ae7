"""Facts about machines: ahead-of-time compilation for TPUs and GPUs, and the doctor. To add a chip, edit this package."""
