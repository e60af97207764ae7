"""Facts about machines: programs compiled for TPUs and GPUs ahead of time, and the doctor. To add a chip, edit this."""
