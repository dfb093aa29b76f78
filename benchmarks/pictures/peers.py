"""peers.svg: step time and peak memory beside mlx-lm and PEFT, from the tables of benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.readme import README, rows_of

from .svg import Picture

UNITS = {"ms": 1e-3, "s": 1.0, "MB": 1e6, "GB": 1e9, "GiB": 2**30}
LEFT, TIME, RATIO, MEMORY = 16, 172, 474, 510  # x of names, step times, ratios and memory
LONGEST = 180  # pixels of the longest bar
ROW = 27

Row = dict[str, str]  # of a table: heading -> cell


def size(figure: str) -> float:
    """Seconds or bytes: "550 ms" is 0.55."""
    amount, unit = figure.split()
    return float(amount) * UNITS[unit]


def bars(picture: Picture, x: float, y: float, rows: Sequence[Row], heading: str) -> None:
    """One bar per figure of a column, with the figure beside it."""
    longest = max(size(row[heading]) for row in rows if row[heading])
    for number, row in enumerate(rows):
        top, figure = y + ROW * number, row[heading]
        if not figure:
            continue
        is_ours, is_floor = row["trainer"] == "mlx_impl", row["trainer"].startswith("floor")
        width = LONGEST * size(figure) / longest
        if is_floor:
            picture.rect(x, top, width, ROW - 9, stroke="muted", dashed=True, radius=2)
        else:
            picture.rect(x, top, width, ROW - 9, fill="blue" if is_ours else "gray", radius=2)
        picture.text(x + width + 7, top + 14, figure, bold=is_ours)


def panel(picture: Picture, y: float, title: str, below: str, rows: Sequence[Row]) -> float:
    """The bars of some rows of a table; returns the y where the next panel begins."""
    picture.text(LEFT, y, title, size=15, bold=True)
    picture.text(LEFT, y + 19, below, size=12, color="muted")
    y += 44
    picture.text(TIME, y, "step time", size=12, color="muted")
    picture.text(RATIO, y, "ours / its", size=12, color="muted", anchor="end")
    picture.text(MEMORY, y, "peak memory", size=12, color="muted")
    y += 9
    for number, row in enumerate(rows):
        base = y + ROW * number + 14
        name = "this trainer" if row["trainer"] == "mlx_impl" else row["trainer"]
        picture.text(LEFT, base, name, bold=row["trainer"] == "mlx_impl")
        if row["ours / its"]:
            ratio = float(row["ours / its"].partition(" ")[0])
            picture.text(RATIO, base, f"{ratio:.2f}", bold=True, color="green", anchor="end")
    bars(picture, TIME, y, rows, "step")
    bars(picture, MEMORY, y, rows, "peak")
    return y + ROW * len(rows) + 30


def draw() -> str:
    text = README.read_text(encoding="utf-8")
    cpu = [row for row in rows_of(text, "table") if row["trainer"] != "floor, shared prefix once"]
    full, checkpointed = (
        [row for row in rows_of(text, "gpu") if row["case"] == case]
        for case in ("every position a target", "gradient checkpointing")
    )
    slow = next(row["step"] for row in rows_of(text, "as-installed") if row["trainer"] == "mlx-lm")
    picture = Picture(
        702,
        "Step time and peak memory beside mlx-lm and PEFT",
        "Horizontal bars of the tables in benchmarks/README.md, on a CPU and on a GPU.",
    )
    below = "Shorter is better. All trainers get the same arrays and take turns in one run."
    picture.heading("Step time and peak memory", [below])
    y = panel(picture, 88, "CPU: SmolLM2-135M in float32", "two x86-64 cores, batch size 4, rank 8", cpu)
    what = "4 x 1024 tokens, every position a target, rank 8; compiled"
    y = panel(picture, y, "GPU: the shape of TinyLlama-1.1B in bfloat16, one H200", what, full)
    y = panel(picture, y, "GPU, gradient checkpointing", "the same, activations recomputed", checkpointed)
    notes = (
        "ours / its: median of paired steps. floor: the step's model FLOPs at the rate of a large matmul.",
        f"CPU: both MLX trainers have a fast BLAS; with the BLAS that MLX ships, mlx-lm's step takes {slow}.",
        "CPU: the rows of a batch share a system prompt, which this trainer computes once per batch.",
        "CPU: PyTorch does not count bytes; its memory is the resident memory of its process.",
    )
    for row, note in enumerate(notes):
        picture.text(LEFT, y + 17 * row, note, size=12, color="muted")
    return str(picture)
