"""Find a model by its name: a folder, a file, or `org/name` on the Hugging Face hub.

Source: `huggingface_hub.snapshot_download`, which downloads into a cache that all programs share and, offline
or with HF_HUB_OFFLINE=1, uses what is in the cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...disk.files import one_line

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = ("*.json", "*.jinja")
ALL_FILES = (*TEXT_FILES, "*.safetensors")  # no pickles, no code
DUPLICATES = "consolidated*"  # Mistral's repositories hold the weights a second time


def find_model(name: str | Path, files: tuple[str, ...] = ALL_FILES) -> Path:
    """The local folder or file of that name, else a folder with these files of the hub."""
    path = Path(name)
    if path.exists() or path.suffix == ".gguf" or not HUB_NAME.fullmatch(str(name)):
        return path
    return from_hub(str(name), files)


def from_hub(name: str, files: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is not a local folder or file; to get it from the Hugging Face hub, install "
            f"huggingface_hub: pip install 'mlx-lora-reference[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=DUPLICATES))
    except Exception as error:  # network, server and cache raise many kinds
        raise ValueError(
            f"{name} is not a local folder or file, and the hub does not give it: {one_line(error)}"
        ) from None
