"""Read and write models and adapters; `formats/` has one module per file format."""
