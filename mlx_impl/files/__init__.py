"""Models and adapters, in and out; `formats/` has one module a format."""
