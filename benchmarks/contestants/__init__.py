"""The trainers that are compared, one file each, behind one small interface.

A module has `build(inputs, case, **options)`, which returns a Contestant on the case's arrays: LoRA of the
case's rank on all seven linears of every block, AdamW, the case's updates in a cycle. All else is the
library's own design. A module imports its framework, so it runs in its own process (`worker.py`).
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
        """Does one optimizer update, waits for it, and returns the library's mean loss in nats."""
        ...


@dataclass(frozen=True)
class Entry:
    title: str
    module: str
    needs: tuple[str, ...]  # packages
    options: dict[str, Any] = field(default_factory=dict)
    memory: str = "mlx"  # the allocator that counts bytes: "mlx" or "torch"

    def can_run(self, case: Case) -> bool:
        """Only the MLX trainers have a quantized base here."""
        return not case.bits or self.memory == "mlx"

    @property
    def is_installed(self) -> bool:
        return all(importlib.util.find_spec(package) is not None for package in self.needs)


CONTESTANTS = {
    "ours": Entry("mlx_impl", "ours", ("mlx",)),
    "ours-compiled": Entry("mlx_impl, compiled", "ours", ("mlx",), {"compiled": True}),
    "ours-eager": Entry("mlx_impl, eager", "ours", ("mlx",), {"compiled": False}),
    "ours-4-bits": Entry("mlx_impl, 4 bits", "ours", ("mlx",), {"bits": 4}),
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
