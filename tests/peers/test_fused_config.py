"""A fused folder of transformers 5's configuration is read right by transformers and by mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch

from mlx_impl.config import LoRAConfig
from mlx_impl.files.adapters import save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.fusing import fuse
from mlx_impl.lora import add_lora
from tests.derived import within
from tests.peers.families import FAMILIES, Family, load_with_transformers, write_family

ROPE = {"rope_type": "default", "rope_theta": 77.0}
NAMES = ("llama2", "llama3", "llama-linear", "qwen2", "qwen3", "mistral-no-window")
WITH_ROPE = {name: FAMILIES[name] for name in NAMES}
WITH_ROPE |= {f"{kind}-theta": Family(kind, {"rope_parameters": ROPE}) for kind in ("Llama", "Qwen2")}


@pytest.mark.parametrize("family", WITH_ROPE.values(), ids=WITH_ROPE)
def test_transformers_and_mlx_lm_read_the_rope_of_a_fused_folder(tmp_path: Path, family: Family) -> None:
    base = write_family(tmp_path / "base", family)
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    model, config = load_model(base).model, LoRAConfig(rank=2)
    add_lora(model, config)
    save_adapter(model, config, tmp_path / "adapter", "base")  # B is zero: the weights stay
    fuse(load_model(base), tmp_path / "adapter", tmp_path / "fused", dequantize=False)
    tokens = np.random.default_rng(3).integers(3, 200, (2, 60))
    ours = np.array(load_model(base).model(mx.array(tokens)))
    theirs = mlx_lm.utils.load_model(tmp_path / "fused")[0]
    theirs.set_dtype(mx.float32)
    with torch.no_grad():
        torchs = load_with_transformers(tmp_path / "fused")(torch.tensor(tokens)).logits.numpy()
    for logits in (np.array(theirs(mx.array(tokens))), torchs):
        verdict = within("logits", logits, ours, 0.0, 60)
        assert verdict.used <= 1, verdict.report
