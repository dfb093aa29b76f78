"""What a program calls: the trainer with its state, the finite guard, merging, memory checks, the BLAS."""
