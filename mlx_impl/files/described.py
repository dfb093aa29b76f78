"""What a model's files say of its shape, without its weights: `config.json`, or a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig, require_number
from ..disk.files import read_json_object
from .checkpoint import locate
from .formats.gguf import read_gguf_config
from .formats.hf_config import read_config
from .formats.hub import TEXT_FILES
from .formats.mlx_quantization import module_quantization, stored_settings
from .quantized import Quantization

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Description:
    path: Path  # of the file that says so
    config: ModelConfig
    quantization: Quantization | None = None  # of MLX-quantized weights; modules of other settings left aside
    max_tokens: int | None = None  # the longest row that the model was made for


def read_description(model: str | Path | None) -> Description:
    """Raises ValueError, as `load_model`, where no such model can be used."""
    path = locate(model, TEXT_FILES)
    if path.is_file():
        config, metadata = read_gguf_config(path)
        most = metadata.get(f"{metadata['general.architecture']}.context_length")
        return Description(path, config, None, most if isinstance(most, int) and most > 0 else None)
    config, path = read_config(path), path / CONFIG_FILE
    raw = read_json_object(path)
    try:
        settings, most = stored_settings(raw), raw.get("max_position_embeddings")
        quantization = module_quantization("all", settings) if settings else None
        if most is not None:
            require_number("max_position_embeddings", most, int)
    except KeyError as error:
        raise ValueError(f"{path}: quantization lacks the key {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Description(path, config, quantization, most)
