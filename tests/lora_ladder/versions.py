"""The versions of the ladder and of what it computes with, looked up and not imported."""

from __future__ import annotations

import importlib.metadata
import platform

from tests.lora_ladder.here import IS_INSTALLED

PACKAGES = ("mlx", "torch", "numpy")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def version_line() -> str:
    """What `lora-ladder --version` prints."""
    ladder = version_of("lora-ladder") if IS_INSTALLED else "in its repository"
    packages = [f"{name} {version_of(name)}" for name in PACKAGES]
    return ", ".join([f"lora-ladder {ladder}", *packages, f"Python {platform.python_version()}"])
