"""Write a Hugging Face folder: weights in files of at most 5 GB, configuration, tokenizer.

Source: transformers' `save_pretrained`: `model.safetensors`, or `model-00001-of-0000N.safetensors` and an
index with `weight_map`; the keys of `config.json` in the spelling that transformers 4 and 5 and mlx-lm read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...config import ModelConfig
from ...disk.files import require_file
from ...disk.folders import TemporaryFolder
from ...text.tokenizer import ChatTokenizer
from .safetensors import INDEX, save

MAX_SHARD_BYTES = 5 * 10**9  # of a file; a larger tensor gets a file of its own
# Files to copy besides weights and config.json: no code, no weights in other formats.
SIDE_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template*.json", "LICENSE*", "NOTICE*"),
)


def write_weights(folder: TemporaryFolder, tensors: Iterable[tuple[str, mx.array]], form: str) -> None:
    """Write tensors in order, in shards; `form` is "mlx" if only MLX can read them, else "pt"."""
    weight_map: dict[str, int] = {}
    shard: dict[str, mx.array] = {}
    num_full = total = 0
    for name, array in tensors:
        size = sum(held.nbytes for held in shard.values())
        if shard and size + array.nbytes > MAX_SHARD_BYTES:
            write_part(folder, num_full, shard, form)
            num_full += 1
            shard = {}
        shard[name] = array
        weight_map[name], total = num_full, total + array.nbytes
    write_part(folder, num_full, shard, form)
    name_files(folder, num_full + 1, weight_map, total)


def write_part(folder: TemporaryFolder, number: int, shard: dict[str, mx.array], form: str) -> None:
    save(folder.file(part_name(number)), shard, {"format": form})


def part_name(number: int) -> str:
    return f"{number}.part"


def name_files(folder: TemporaryFolder, count: int, weight_map: dict[str, int], total: int) -> None:
    """Rename the files, now that their number is known; write the index if there are several."""
    if count == 1:
        os.replace(folder.path / part_name(0), folder.file("model.safetensors"))
        return
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    for number, name in enumerate(names):
        os.replace(folder.path / part_name(number), folder.file(name))
    files = {name: names[number] for name, number in sorted(weight_map.items())}
    write_json(folder.file(INDEX), {"metadata": {"total_size": total}, "weight_map": files})


def copy_side_files(source: Path, folder: TemporaryFolder) -> None:
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if not path.is_dir():
                require_file(path)
                shutil.copyfile(path, folder.file(path.name))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_json(config: ModelConfig, dtype: str, extra: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` for a model that came without one; `extra` are keys that are not in ModelConfig."""
    family = family_of(config)
    record: dict[str, Any] = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        **{key: value for key, value in extra.items() if value is not None},
    }
    if config.rope_scaling is not None:
        record["rope_scaling"] = rope_record(config)
    if family == "mistral" or config.sliding_window is not None:
        record["sliding_window"] = config.sliding_window
    if family.startswith("qwen") and config.sliding_window is not None:
        record |= {"use_sliding_window": True, "max_window_layers": 0}
    return record


def family_of(config: ModelConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def complete(record: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A `config.json` with the keys that it leaves to a default, or keeps where not every program looks.

    transformers 5 writes RoPE's base and scaling in `rope_parameters` alone, where mlx-lm 0.32 does not look
    for Llama and Qwen2; and mlx-lm's defaults are not always transformers'.
    """
    values: dict[str, Any] = {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.rope_scaling is not None:
        values["rope_scaling"] = rope_record(config)
    return record | {key: value for key, value in values.items() if record.get(key) is None}


def rope_record(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    assert scaling is not None
    if scaling.rope_type == "linear":  # the other fields are llama3's
        return {"rope_type": "linear", "factor": scaling.factor}
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_type": scaling.rope_type, **{name: getattr(scaling, name) for name in names}}


def write_tokenizer(folder: TemporaryFolder, tokenizer: ChatTokenizer, settings: dict[str, Any]) -> None:
    """`settings` are the special tokens and the chat template; those that are None are left out."""
    tokenizer.save(folder.file("tokenizer.json"))
    record = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    given = {key: value for key, value in settings.items() if value is not None}
    write_json(folder.file("tokenizer_config.json"), record | given)
