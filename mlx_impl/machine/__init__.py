"""This machine: its memory, its address space, and the BLAS that multiplies matrices on its CPU."""
