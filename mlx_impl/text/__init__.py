"""Lines of data -> conversations -> chat template -> tokens with their targets marked."""
