"""A model's name to a path: a folder, a file, or `org/name` on the Hugging Face hub, from its cache if there.

Source: `huggingface_hub.snapshot_download`, which keeps one copy for all programs and, offline or with
HF_HUB_OFFLINE=1, takes it from there.
"""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXTS = ("*.json", "*.jinja")
WEIGHTS_AND_TEXTS = (*TEXTS, "*.safetensors")  # no pickles, no code
AGAIN = "consolidated*"  # Mistral's repositories hold the weights a second time


def find_model(name: str | Path, files: tuple[str, ...] = WEIGHTS_AND_TEXTS) -> Path:
    """The folder or file of that name here, else these files of the hub's; ValueError without either."""
    path = Path(name)
    if path.exists() or path.suffix == ".gguf" or not HUB_NAME.fullmatch(str(name)):
        return path
    return from_hub(str(name), files)


def from_hub(name: str, files: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is no folder or file here; to get it from the Hugging Face hub, install "
            f"huggingface_hub: pip install 'mlx-lora-reference[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=AGAIN))
    except Exception as error:  # of the network, the server, the cache, each its own
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise ValueError(f"{name} is no folder or file here, nor to be had from the hub: {reason}") from None
