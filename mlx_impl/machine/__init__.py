"""What this machine brings: its memory, its address space, the BLAS that multiplies matrices on a CPU."""
