"""What machines are like: ahead-of-time compilation for TPUs, and the doctor. Open it to add a chip."""
