"""The pictures of the documents, drawn by `python -m benchmarks.pictures`: the SVG files of this folder.

A picture is a module with `draw() -> str`. Figures come from one place each: the code, the tables of
benchmarks/README.md, or main_job.json.
"""
