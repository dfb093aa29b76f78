"""The same numbers in less time and memory, over the modules and parameters of the pattern.

It enters `train.train` by one seam, a `Loss` (`forward.FAST`) with its optimizer (`vectors.VectorOptimizer`).
"""
