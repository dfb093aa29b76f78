"""The trainers that are compared, a file each, all behind one small face.

A module has `build(inputs, case, **options)`, which returns a Contestant on the case's arrays: rank-r LoRA on
all seven linears of every block, AdamW, the case's updates in turn. What then differs is each library's own
design. Each imports its framework, so a contestant is built in a process of its own (`worker.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.inputs import Inputs


class Contestant(Protocol):
    def step(self) -> float:
        """One optimizer update, done when it returns; the mean loss in nats that the library reports."""
        ...


@dataclass(frozen=True)
class Entry:
    title: str
    module: str
    needs: tuple[str, ...]  # packages
    options: dict[str, Any] = field(default_factory=dict)
    memory: str = "mlx"  # whose bytes are counted: "mlx" or "torch"

    @property
    def is_installed(self) -> bool:
        return all(importlib.util.find_spec(package) is not None for package in self.needs)


CONTESTANTS = {
    "ours": Entry("mlx_impl", "ours", ("mlx",)),
    "ours-compiled": Entry("mlx_impl, compiled", "ours", ("mlx",), {"compiled": True}),
    "ours-eager": Entry("mlx_impl, eager", "ours", ("mlx",), {"compiled": False}),
    "mlx-lm": Entry("mlx-lm", "mlx_lm", ("mlx_lm",)),
    "peft": Entry("PEFT, PyTorch", "peft", ("peft", "transformers"), memory="torch"),
    "peft-compiled": Entry(
        "PEFT, torch.compile", "peft", ("peft", "transformers"), {"compiled": True}, memory="torch"
    ),
    "pytorch": Entry("reference/, PyTorch", "pytorch", ("torch",), memory="torch"),
    "matmul": Entry("matrix multiplication", "matmul", ("mlx",)),
}


def named_entry(name: str) -> Entry:
    if name not in CONTESTANTS:
        raise ValueError(f"a contestant must be one of {', '.join(CONTESTANTS)}, got {name!r}")
    return CONTESTANTS[name]


def build(name: str, inputs: Inputs, case: Case) -> Contestant:
    entry = named_entry(name)
    module = importlib.import_module(f"{__name__}.{entry.module}")
    contestant: Contestant = module.build(inputs, case, **entry.options)
    return contestant
