"""Write a tiny model as a Hugging Face folder and as a GGUF file, without `mlx_impl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTROL = ["<pad>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*CONTROL, *ALPHABET, "es"]
MERGES = [("e", "s")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LINEARS = {  # name: (GGUF's name, rows, columns)
    "self_attn.q_proj": ("attn_q", 32, 32),
    "self_attn.k_proj": ("attn_k", 16, 32),
    "self_attn.v_proj": ("attn_v", 16, 32),
    "self_attn.o_proj": ("attn_output", 32, 32),
    "mlp.gate_proj": ("ffn_gate", 64, 32),
    "mlp.up_proj": ("ffn_up", 64, 32),
    "mlp.down_proj": ("ffn_down", 32, 64),
}


def tiny_weights(seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": normal(len(TOKENS), 32),
        "model.norm.weight": 1 + normal(32),
        "lm_head.weight": normal(len(TOKENS), 32),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, (_, rows, columns) in LINEARS.items():
            weights[f"{prefix}.{name}.weight"] = normal(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = 1 + normal(32)
    return weights


def write_folder(folder: Path, **config: Any) -> Path:
    """Write config.json, with changes, model.safetensors, tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    arrays = {name: mx.array(value) for name, value in tiny_weights().items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Q and K: within a head of size K, rows 0, K/2, 1, K/2 + 1, ..."""
    rows = weight.reshape(num_heads, -1, weight.shape[1])
    head_dim = rows.shape[1]
    order = [i + half for i in range(head_dim // 2) for half in (0, head_dim // 2)]
    return rows[:, order].reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama", pre: str = "smollm") -> Path:
    """The same model, as llama.cpp's conversion script would write it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = tiny_weights()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(2):
        for name, (short, _, _) in LINEARS.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(short)
            stored = permute(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(stored))
        for norm, short in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            writer.add_tensor(f"blk.{layer}.{short}.weight", weights[f"model.layers.{layer}.{norm}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def conversation_line(question: str, reply: str, **more: Any) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return json.dumps({"messages": messages, **more})


def write_data(folder: Path, num_examples: int = 6) -> Path:
    """A data folder with examples of different lengths; 6 are not a multiple of the usual batch size 4."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [conversation_line("x" * (1 + 2 * n), f"{n} yes", answer="yes") for n in range(num_examples)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
