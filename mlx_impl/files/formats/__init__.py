"""Other projects' file formats for models and adapters; `checkpoint.py` and `adapters.py` use them."""
