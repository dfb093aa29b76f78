"""Claims about every model, adapter, batch and order of acts, tried on random ones."""
