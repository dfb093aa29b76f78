"""What `config.json` says of MLX-quantized weights: mlx-lm's key "quantization", with exceptions by module.

Source: mlx-lm's `utils.load_model`: a module is quantized where the file has its scales; how, says the entry
of its own name, else the global one. mlx-community repeats the object under "quantization_config", the key
that other methods (GPTQ, AWQ, bitsandbytes) use with a "quant_method".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config import require_number
from ...disk.files import read_json_object
from ..quantized import Packing

GLOBAL_KEYS = ("group_size", "bits", "mode")


def quantization_of(raw: dict[str, Any]) -> dict[str, Any] | None:
    return raw.get("quantization") or raw.get("quantization_config") or None


def require_supported(raw: dict[str, Any]) -> None:
    """ValueError that names what is not MLX's affine mode."""
    for key in ("quantization", "quantization_config"):
        settings = raw.get(key) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{key} must be an object, got {settings!r}")
        for name, value in settings.items():
            if isinstance(value, dict):
                require_affine(f"{key} of {name}", value)
            elif name not in GLOBAL_KEYS and not isinstance(value, bool):
                raise ValueError(f"{key} must be MLX's, which has no {name}, got {value!r}")
        require_affine(key, settings)


def require_affine(where: str, settings: dict[str, Any]) -> None:
    if settings.get("mode") not in (None, "affine"):
        raise ValueError(f"the mode of {where} must be affine, got {settings['mode']!r}")


def read_packings(folder: Path, names: set[str]) -> dict[str, Packing]:
    """How each of the named modules, which have scales, is quantized."""
    path = folder / "config.json"
    settings = quantization_of(read_json_object(path))
    if names and settings is None:
        raise ValueError(f"{path}: has no quantization, and {min(names)} has quantized weights")
    try:
        return {name: packing_of(name, settings or {}) for name in sorted(names)}
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} of quantization is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def packing_of(name: str, settings: dict[str, Any]) -> Packing:
    own = settings.get(name, True)
    if own is False:
        raise ValueError(f"quantization says that {name} is not quantized, and the weights are")
    chosen = {**settings, **(own if isinstance(own, dict) else {})}
    for key in ("group_size", "bits"):
        require_number(f"quantization of {name}: {key}", chosen[key], int)
    return Packing(chosen["group_size"], chosen["bits"])
