"""The same numbers in less time and memory, over the modules and parameters of the pattern.

It is entered by one seam, `train.Loss`.
"""
