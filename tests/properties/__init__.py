"""Property tests: claims about every model, adapter, batch and order of operations, tried on random ones."""
