"""Small random checkpoints of each family, written by transformers and loaded by transformers and PEFT."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_impl.config import LoRAConfig
from tests.peers.cases import Arrays, random_arrays
from tests.peers.twin import AllDouble, PeftTwin, peft_config
from tests.tiny_folder import CONTROL, MERGES, TEMPLATE, TOKENS

VOCAB_SIZE = 263  # a prime, large enough for the tokenizer
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,  # 6 * 10 is not the width
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,  # one frequency kept, one blended, three divided
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# Qwen2 has no key head_dim; Qwen3's width need not be a multiple of its heads.
QWEN2_SIZES = SIZES | {"hidden_size": 60, "head_dim": None}
QWEN3_SIZES = SIZES | {"hidden_size": 27, "intermediate_size": 45}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}


@dataclass(frozen=True)
class Family:
    """A class of transformers, its configuration, and how its checkpoint is stored."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"

    def config(self) -> transformers.PreTrainedConfig:
        sizes = {"Qwen2": QWEN2_SIZES, "Qwen3": QWEN3_SIZES}.get(self.kind, SIZES)
        given = {key: value for key, value in (sizes | self.settings).items() if key != "head_dim" or value}
        return getattr(transformers, f"{self.kind}Config")(**given)


BF16, FP16 = torch.bfloat16, torch.float16
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama2": Family("Llama"),
    "llama2-as-many-kv-heads-bf16-shards": Family("Llama", {"num_key_value_heads": 6}, BF16, "20KB"),
    "llama3": Family("Llama", {"rope_parameters": LLAMA3_ROPE}, BF16),
    "llama3-tied-shards": Family("Llama", {"rope_parameters": LLAMA3_ROPE} | TIED, FP16, "20KB"),
    "llama-linear": Family("Llama", {"rope_parameters": LINEAR_ROPE}, FP16),
    "smollm2": Family("Llama", {"hidden_size": 36, "head_dim": None} | TIED, BF16),
    "mistral-window": Family("Mistral", {"sliding_window": 4}, BF16, "20KB"),
    "mistral-window-1-tied": Family("Mistral", {"sliding_window": 1} | TIED),
    "mistral-window-is-length": Family("Mistral", {"sliding_window": 13}),
    "mistral-no-window": Family("Mistral", {"sliding_window": None}, FP16),
    "qwen2": Family("Qwen2", {"sliding_window": 5}),  # off, since use_sliding_window is False
    "qwen2-tied-bf16-shards": Family("Qwen2", TIED, BF16, "20KB"),
    "qwen2-window": Family("Qwen2", SLIDING, FP16),
    "qwen2-window-in-no-layer": Family("Qwen2", SLIDING | {"max_window_layers": 3}),
    "qwen3": Family("Qwen3", {"sliding_window": 5}, BF16),
    "qwen3-tied-shards": Family("Qwen3", TIED, FP16, "20KB"),
    "qwen3-window-linear": Family("Qwen3", SLIDING | {"rope_parameters": LINEAR_ROPE}),
}


def write_family(folder: Path, family: Family) -> Path:
    """Write a checkpoint with random weights, norms and biases included, and a tokenizer."""
    config = family.config()
    model = getattr(transformers, f"{family.kind}ForCausalLM")(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = random_arrays(shapes, 1.6 / config.hidden_size**0.5, seed=101)
    weights |= {name: 1 + w for name, w in weights.items() if "norm" in name}
    model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()}, strict=False)
    model.to(family.dtype).save_pretrained(folder, max_shard_size=family.shard_size)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def use_transformers_4_keys(folder: Path) -> Path:
    """Replace `rope_parameters` by `rope_theta` and `rope_scaling`, as nearly all published folders have."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_with_transformers(folder: Path) -> torch.nn.Module:
    """The model as `from_pretrained` reads the folder, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


class FolderTwin(PeftTwin):
    """transformers' model of a folder, optionally with other weights, with an adapter added by PEFT."""

    def __init__(
        self,
        folder: Path,
        lora: LoRAConfig,
        factors: Arrays | None = None,
        dtype: torch.dtype = torch.float64,
        weights: Arrays | None = None,
    ) -> None:
        """Without `factors` they are random; B is not zero."""
        self.precision = AllDouble if dtype is torch.float64 else nullcontext
        read = load_with_transformers(folder) if weights is None else None
        config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are given dequantized
        with self.precision():
            model = getattr(transformers, config.architectures[0])(config).to(dtype)
            given = read.state_dict() if read else {n: torch.tensor(w) for n, w in (weights or {}).items()}
            result = model.load_state_dict(given, strict=False)
            assert not result.unexpected_keys
            assert set(result.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
            self.model = peft.get_peft_model(model, peft_config(lora, config.num_hidden_layers)).to(dtype)
        trained = self.trained()
        shapes = {name: tuple(p.shape[::-1]) for name, p in trained.items()}  # ours are (in, out)
        self.given = random_factors(shapes) if factors is None else factors
        assert trained.keys() == self.given.keys()
        with torch.no_grad():
            for name, value in self.given.items():
                trained[name].copy_(torch.tensor(value).T if value.ndim == 2 else torch.tensor(value))

    def logits_without_adapter(self, tokens_BT: np.ndarray) -> np.ndarray:
        with self.model.disable_adapter():
            return self.logits(tokens_BT)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """transformers' own greedy decoding, without its cache, which is wrong for a window of 1."""
        with self.precision(), torch.no_grad():
            whole = self.model.eval().generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                use_cache=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return whole[0, len(prompt) :].tolist()


def random_factors(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Random factors. B is not zero, so that A's gradients are not zero; magnitudes are positive."""
    factors = random_arrays(shapes, 0.2, seed=102)
    return factors | {n: 1.5 + f for n, f in factors.items() if n.endswith("magnitude")}
