"""The memory model as a table with the bytes of a case, and the model beside the measured peaks."""

from __future__ import annotations

from dataclasses import replace

from .cases import CASES, SMALL, Case
from .memory import (
    AFTER,
    ATTENTION,
    BEFORE,
    BYTES,
    CHECKPOINTED_BLOCK,
    HEAD,
    TRAINED,
    UPDATE,
    Budget,
    Kept,
    Shapes,
    numbers,
)
from .memory_run import Comparison
from .table import markdown, shown_bytes

SMALL_CASE = CASES["small"]
DEEP = replace(SMALL, num_hidden_layers=12, hidden_size=384, intermediate_size=1024)
LARGE_HEAD = replace(SMALL, vocab_size=16384)
MODELLED: dict[str, Case] = {  # the cases whose peaks are measured
    "smollm2": replace(CASES["smollm2"], num_windows=1),
    "small": SMALL_CASE,
    "deep, rank 32": replace(SMALL_CASE, model=DEEP, tokens=256, rank=32),
    "large head": replace(SMALL_CASE, model=LARGE_HEAD, tokens=64, target_share=1.0),
    "few tokens, rank 64": replace(SMALL_CASE, tokens=8, batch_size=1, rank=64, target_share=1.0),
}


def model_table(shapes: Shapes, budget: Budget) -> str:
    """Every line of the model with its bytes."""
    width, L = BYTES[shapes.dtype], shapes.config.num_hidden_layers
    parts: list[tuple[str, tuple[Kept, ...], int]] = [
        (f"{L} blocks, attention", ATTENTION, width * shapes.positions * L),
        (f"{L} blocks, before attention", BEFORE, width * shapes.needed * L),
        (f"{L} blocks, after attention", AFTER, width * (shapes.needed * (L - 1) + shapes.targets)),
        (f"{L} blocks, checkpointed", CHECKPOINTED_BLOCK, width * shapes.needed * L),
        ("head", HEAD, width * shapes.targets),
        ("trained", TRAINED, 4),
        ("update", UPDATE, 4),
    ]
    rows = [("base", "all frozen weights", "", shown_bytes(budget.base), "used in every step")]
    for part, table, scale in parts:
        for kept in table:
            size = f"{kept.count} x {kept.axes}" if kept.count > 1 else kept.axes
            rows.append(
                (part, kept.what, size, shown_bytes(scale * numbers((kept,), shapes.sizes)), kept.why)
            )
    return markdown(("where", "what is kept", "numbers per position", "bytes", "why"), rows)


def comparison_table(compared: dict[tuple[str, bool], Comparison]) -> str:
    rows = [
        (
            name + (", checkpointed" if is_checkpointed else ""),
            shown_bytes(found.budget.peak_bytes),
            shown_bytes(found.measured.peak_bytes),
            f"{found.error:+.1%}",
        )
        for (name, is_checkpointed), found in compared.items()
    ]
    return markdown(("case", "model", "measured", "model's error"), rows)
