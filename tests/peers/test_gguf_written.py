"""GGUF files of fused models: transformers reads the weights and tokens of the fused folder from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlx_impl.config import LoRAConfig
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.fusing import fuse
from mlx_impl.files.fusing_gguf import fuse_to_gguf
from tests.derived import within
from tests.peers.families import FAMILIES, load_with_transformers, write_family
from tests.units.test_fusing import write_adapter

LORA = LoRAConfig(rank=2, alpha=5.0, target_modules=("q_proj", "k_proj", "up_proj"))
# transformers 5.23 reads neither rope factors nor Mistral from a GGUF file.
NAMES = ("llama2", "qwen2", "qwen3")
TEXT = "yes, Zoë: it's 1234\n\nessess <|im_start|>user"


def from_gguf(path: Path, folder: Path) -> Any:
    """transformers' model of the file; it reads no head dimension there, so the configuration is given."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class: Any = transformers.AutoModelForCausalLM
    return model_class.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_a_written_file_as_the_fused_folder_to_the_bit(tmp_path: Path, name: str) -> None:
    base, file = write_family(tmp_path / "base", FAMILIES[name]), tmp_path / "fused.gguf"
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    fuse_to_gguf(load_model(base), adapter, file, dequantize=False)
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    theirs, folders = from_gguf(file, tmp_path / "fused").eval(), load_with_transformers(tmp_path / "fused")
    weights, expected = theirs.state_dict(), folders.state_dict()
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        verdict = within("logits", theirs(tokens).logits.numpy(), folders(tokens).logits.numpy(), 0.0, 60)
    assert verdict.used <= 1, verdict.report
    read: Any = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert read(TEXT, add_special_tokens=False)["input_ids"] == load_model(base).tokenizer.encode(TEXT)
