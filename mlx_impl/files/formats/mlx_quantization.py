"""Read from `config.json` how weights are MLX-quantized: mlx-lm's key "quantization".

Source: mlx-lm's `utils.load_model`. A module is quantized if the file has scales for it; group size and bits
come from the entry with the module's name, else from the global ones. mlx-community repeats the object under
"quantization_config", a key that other methods (GPTQ, AWQ, bitsandbytes) use with a "quant_method".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config import require_number
from ...disk.files import read_json_object
from ..quantized import Quantization

GLOBAL_KEYS = ("group_size", "bits", "mode")


def stored_settings(raw: dict[str, Any]) -> dict[str, Any] | None:
    return raw.get("quantization") or raw.get("quantization_config") or None


def require_supported(raw: dict[str, Any]) -> None:
    """ValueError for any quantization but MLX's affine mode."""
    for key in ("quantization", "quantization_config"):
        settings = raw.get(key) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{key} must be an object, got {settings!r}")
        for name, value in settings.items():
            if isinstance(value, dict):
                require_affine(f"{key} of {name}", value)
            elif name not in GLOBAL_KEYS and not isinstance(value, bool):
                raise ValueError(f"{key} must be MLX's, which has no key {name}, got {value!r}")
        require_affine(key, settings)


def require_affine(where: str, settings: dict[str, Any]) -> None:
    if settings.get("mode") not in (None, "affine"):
        raise ValueError(f"the mode of {where} must be affine, got {settings['mode']!r}")


def read_quantizations(folder: Path, names: set[str]) -> dict[str, Quantization]:
    """Group size and bits of the named modules, which are those that have scales."""
    path = folder / "config.json"
    settings = stored_settings(read_json_object(path))
    if names and settings is None:
        raise ValueError(f"{path}: has no key quantization, but the weights of {min(names)} are quantized")
    try:
        return {name: module_quantization(name, settings or {}) for name in sorted(names)}
    except KeyError as error:
        raise ValueError(f"{path}: quantization lacks the key {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def module_quantization(name: str, settings: dict[str, Any]) -> Quantization:
    own = settings.get(name, True)
    if own is False:
        raise ValueError(f"quantization says that {name} is not quantized, but its weights are")
    chosen = {**settings, **(own if isinstance(own, dict) else {})}
    for key in ("group_size", "bits"):
        require_number(f"quantization of {name}: {key}", chosen[key], int)
    return Quantization(chosen["group_size"], chosen["bits"])
