"""Forms of layers that move fewer bytes on GPUs. Every form computes what the layer's general form computes."""
