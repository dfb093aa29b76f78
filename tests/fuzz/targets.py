"""The files to damage: how each valid one is written, and what reads it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl.cli.parser import parse_arguments
from mlx_impl.cli.training import lock, manifest
from mlx_impl.cli.training.answers import Answer, Evaluation
from mlx_impl.cli.training.run_folder import RunFolder
from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.fast.vectors import VectorOptimizer
from mlx_impl.files.adapters import load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.formats.hf_config import read_config
from mlx_impl.files.formats.hf_tokenizer import tokenizer_from_folder
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.run.state import Progress, load_state, save_state, state_arrays
from mlx_impl.text.examples import encode_all, encode_file
from mlx_impl.text.rows import Reading, read_conversations, read_data_file
from mlx_impl.text.tokenizer import ChatTokenizer
from mlx_impl.train import StepRecord
from tests.fuzz.mutations import BYTES, JSON, LINES, SAFETENSORS, Mutation, mutate_progress
from tests.tiny_folder import LINEARS, TEMPLATE, conversation_line, write_folder

STATE = (*SAFETENSORS, *(mutate_progress,) * 6)
LORA = LoRAConfig(rank=2, alpha=3.0, target_modules=("q_proj", "down_proj"))
IDENTITY: dict[str, Any] = {"the model's weights": "0" * 64, "rank": 2}


@dataclass(frozen=True)
class Target:
    """A file of a valid folder, its mutations, and what reads the folder."""

    write: Callable[[Path], object]
    file: str
    mutations: Sequence[Mutation]
    read: Callable[[Path], object]
    num_cases: int


def write_model(folder: Path) -> None:
    write_folder(folder)


def write_shards(folder: Path) -> None:
    write_folder(folder)
    tensors = tensors_of(folder)
    files = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        mx.save_safetensors(str(folder / file), {n: a for n, a in tensors.items() if files[n] == file})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_quantized(folder: Path) -> None:
    """A quantized model as mlx-lm writes it, with one module in more bits."""
    quantization = {"group_size": 32, "bits": 4, "mode": "affine", "model.layers.0.mlp.up_proj": {"bits": 8}}
    write_folder(folder, quantization=quantization, quantization_config=quantization)
    tensors = tensors_of(folder)
    for name in [n for n in tensors if any(f"{linear}.weight" in n for linear in LINEARS)]:
        bits = 8 if name == "model.layers.0.mlp.up_proj.weight" else 4
        module = name.removesuffix(".weight")
        parts = mx.quantize(tensors[name], 32, bits)
        tensors |= zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def tensors_of(folder: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    return tensors


def base_model(folder: Path) -> CausalLM:
    """A model of the right shapes; reading an adapter checks nothing else of it."""
    return CausalLM(read_config(folder))


def adapted_model(folder: Path) -> CausalLM:
    model = base_model(folder)
    add_lora(model, LORA)
    return model


def write_adapter(folder: Path) -> None:
    write_folder(folder)
    save_adapter(adapted_model(folder), LORA, folder, "base")


def write_mlx_lm_adapter(folder: Path) -> None:
    write_folder(folder)
    save_adapter(adapted_model(folder), LORA, folder, "base", "mlx-lm")


def trained(folder: Path) -> dict[str, mx.array]:
    model, optimizer = adapted_model(folder), VectorOptimizer(TrainConfig(iters=1))
    optimizer.init(model.trainable_parameters())
    return state_arrays(model, optimizer)


def write_state(folder: Path) -> None:
    write_folder(folder)
    save_state(folder / "training_state.safetensors", trained(folder), Progress(3, [(2, 1.5)], IDENTITY))


def write_data(folder: Path) -> None:
    write_folder(folder)
    lines = [conversation_line("x" * n, f"{n} yes", answer="yes") for n in range(1, 5)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "top_p": 0.9}))


CALL = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
REPLY = {"from": "gpt", "value": "b", "weight": 1, "train": True, "reasoning": "why"}
FORMATS = (
    {"conversations": [{"from": "human", "value": "a"}, REPLY], "system": "s", "tools": "[]"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "answer": "c"},
)


def write_formats(folder: Path) -> None:
    write_folder(folder)
    (folder / "train.jsonl").write_text(json.dumps(FORMATS))


def write_gzip(folder: Path) -> None:
    write_folder(folder)
    (folder / "train.jsonl").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 9))


def write_template(folder: Path) -> None:
    write_data(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def read_adapter(folder: Path) -> None:
    load_adapter(base_model(folder), folder)


def read_state(folder: Path) -> None:
    load_state(folder / "training_state.safetensors", IDENTITY, trained(folder))


def encode_data(tokenizer: ChatTokenizer, folder: Path) -> None:
    conversations = read_conversations(folder / "train.jsonl")
    encode_all(tokenizer, conversations, targets="assistant", max_tokens=64)


def read_data(folder: Path) -> None:
    encode_data(tokenizer_from_folder(folder), folder)


def read_formats(folder: Path) -> None:
    """Bad rows are skipped, so that a row after one is read too."""
    data = read_data_file([folder / "train.jsonl"], Reading(skip_bad=True))
    tokenizer = tokenizer_from_folder(folder)
    encoded = encode_file(tokenizer, data.conversations, "assistant", 64, skip_bad=True)
    assert all(map(str.isprintable, (*data.remarks("training"), *encoded.remarks("training"))))


def read_tokenizer(folder: Path) -> None:
    """Encoding data runs the chat template too, which is a program in the file."""
    encode_data(load_model(folder).tokenizer, folder)


SETTINGS = {"rank": 4, "learning_rate": 1e-4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}
RECORDS = [StepRecord(step, 2.5, 0.5, 1e-3, 5, 20, 0.1, 1000) for step in (1, 2, 3)]


def write_run(folder: Path) -> None:
    """The files of a finished run, without its adapter and its training state."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.start(SETTINGS, IDENTITY, Evaluation(1.5, {"trained": [Answer("Who?", "Mia", "Mia.")]}))
    run.open_metrics(RECORDS).close()
    run.finish()


def write_toml(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('rank = 4\nlearning-rate = 1e-4\ntarget_modules = ["q_proj"]\n')


def read_settings(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        parse_arguments(["train", "--config", str(folder / name)])

    return read


def read_resumed(folder: Path) -> None:
    """`--resume` reads the settings in the run's manifest."""
    parse_arguments(["train", "--resume", str(folder)])


def read_lock(folder: Path) -> None:
    """Reading never raises, and the holder is always printable; an unreadable lock counts as refused."""
    record = lock.read(folder / lock.NAME)
    assert lock.holder_name(record).isprintable()
    if record is None:
        raise ValueError(f"{folder / lock.NAME}: not a lock")


def write_lock(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / lock.NAME).write_text('{"host": "here", "process": 5, "parts": "0123456789abcdef"}')


TARGETS: dict[str, Target] = {
    "manifest": Target(write_run, "manifest.json", JSON, manifest.read, 200),
    "manifest_to_resume": Target(write_run, "manifest.json", JSON, read_resumed, 150),
    "before": Target(write_run, "before.json", JSON, lambda f: RunFolder(f).read_before(3), 100),
    "metrics": Target(write_run, "metrics.jsonl", LINES, lambda f: RunFolder(f).read_metrics(3), 100),
    "settings": Target(write_run, "config.yaml", BYTES, read_settings("config.yaml"), 150),
    "settings_toml": Target(write_toml, "config.toml", BYTES, read_settings("config.toml"), 100),
    "lock": Target(write_lock, lock.NAME, JSON, read_lock, 80),
    "model": Target(write_model, "model.safetensors", SAFETENSORS, load_model, 300),
    "shards": Target(write_shards, "model-00002-of-00002.safetensors", SAFETENSORS, load_model, 100),
    "index": Target(write_shards, "model.safetensors.index.json", JSON, load_model, 150),
    "quantized": Target(write_quantized, "model.safetensors", SAFETENSORS, load_model, 150),
    "quantization": Target(write_quantized, "config.json", JSON, load_model, 150),
    "config": Target(write_model, "config.json", JSON, load_model, 250),
    "adapter": Target(write_adapter, "adapter_model.safetensors", SAFETENSORS, read_adapter, 200),
    "adapter_config": Target(write_adapter, "adapter_config.json", JSON, read_adapter, 200),
    "mlx_lm_adapter": Target(write_mlx_lm_adapter, "adapters.safetensors", SAFETENSORS, read_adapter, 120),
    "mlx_lm_adapter_config": Target(write_mlx_lm_adapter, "adapter_config.json", JSON, read_adapter, 150),
    "state": Target(write_state, "training_state.safetensors", STATE, read_state, 250),
    "tokenizer": Target(write_data, "tokenizer.json", JSON, read_tokenizer, 200),
    "tokenizer_config": Target(write_data, "tokenizer_config.json", JSON, read_tokenizer, 200),
    "chat_template": Target(write_template, "chat_template.jinja", BYTES, read_tokenizer, 150),
    "generation_config": Target(write_data, "generation_config.json", JSON, read_tokenizer, 80),
    "data": Target(write_data, "train.jsonl", LINES, read_data, 250),
    "data_formats": Target(write_formats, "train.jsonl", JSON, read_formats, 300),
    "data_gzip": Target(write_gzip, "train.jsonl", BYTES, read_data, 100),
}
