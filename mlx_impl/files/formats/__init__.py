"""File formats at the edge: other people's models and adapters, in and out.

`checkpoint.py` and `adapters.py` are the doors to them.
"""
