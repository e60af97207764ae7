"""Forms of layers that only CPUs need: what accelerators have a fast kernel for is written out by XLA there."""
