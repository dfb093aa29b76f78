"""Puts back whatever a trainer patches in classes, after each claim, so that it reaches no later claim.

mlx-lm's and mlx-vlm's gradient checkpointing, for example, replaces `__call__` of the layer's class for good.
Only methods and other descriptors are put back: a counter or a cache in a class is the trainer's own affair.
A class that is imported and patched within one claim stays as it is: import what you patch with the adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

# Packages that no trainer is part of. Of PyTorch and MLX, a trainer patches layers and optimizers.
OTHERS = {
    *sys.stdlib_module_names,
    "_pytest",
    "pytest",
    "pluggy",
    "numpy",
    "lora_ladder",
    "reference",
    "tests",
}
LAYERS = ("torch.nn.modules", "torch.optim", "mlx.nn", "mlx.optimizers")


class PutsBack:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.before: dict[type, dict[str, Any]] = {}  # the members of every class that a trainer may patch
        self.seen: set[type] = set()
        self.num_modules = 0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        if len(sys.modules) != self.num_modules:  # a walk takes 5 ms, and there is a thousand claims
            self.num_modules = len(sys.modules)
            self.look_at_subclasses(object)
        try:
            return (yield)
        finally:
            self.put_back()

    def look_at_subclasses(self, base: type) -> None:
        cls: type
        for cls in type.__subclasses__(base):
            if cls not in self.seen:
                self.seen.add(cls)
                if may_be_patched(cls):
                    self.before[cls] = dict(vars(cls))
                self.look_at_subclasses(cls)

    def put_back(self) -> None:
        for cls, before in self.before.items():
            if list(map(id, vars(cls).values())) != list(map(id, before.values())):
                self.put_back_methods(cls, before)
                self.before[cls] = dict(vars(cls))

    def put_back_methods(self, cls: type, before: dict[str, Any]) -> None:
        now = dict(vars(cls))
        for name in now.keys() - before.keys():
            if is_method(now[name]):
                delattr(cls, name)
        for name, member in before.items():
            if now.get(name) is not member and is_method(member):
                setattr(cls, name, member)


def may_be_patched(cls: type) -> bool:
    module = str(cls.__module__)
    package = module.partition(".")[0]
    return module.startswith(LAYERS) if package in ("torch", "mlx") else package not in OTHERS


def is_method(member: object) -> bool:
    """A function, a property, a static method: whatever Python binds to an instance or to the class."""
    return hasattr(type(member), "__get__")
