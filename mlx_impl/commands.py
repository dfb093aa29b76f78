"""The three commands, from parsed flags to printed results."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
from rich.console import Console

from .adapters import load_adapter
from .checkpoint import LoadedModel, load_model
from .config import LoRAConfig, TrainConfig, require_seed
from .data import evaluation_batches, is_text, read_conversations
from .finetune import finetune
from .generate import generate as generate_tokens
from .job import Job
from .tokenizer import encode_all
from .train import evaluate as evaluate_model

GEOGRAPHY = Path(__file__).resolve().parent.parent / "fixtures" / "geography"
MAX_NATS = 700.0  # of which exp is still a float
LORA_FLAGS = (*(field.name for field in fields(LoRAConfig)), "target_regex")
AT_LEAST_ONE = ("batch_size", "grad_accumulation_steps", "max_seq_length", "steps_per_eval", "save_every")


def train(args: argparse.Namespace) -> None:
    for flag in AT_LEAST_ONE:
        require_at_least(1, flag, getattr(args, flag))
    for flag in ("patience", "num_questions"):
        require_at_least(0, flag, getattr(args, flag) or 0)
    if args.resume is not None and args.adapter_path is not None:
        raise ValueError("--adapter-path is that of --resume: give one of them")
    settings = {
        field.name: getattr(args, field.name) for field in fields(TrainConfig) if field.name != "iters"
    }
    if args.data_seed is None:
        settings["data_seed"] = args.seed
    job = Job(
        model=args.model,
        data=data_folder(args.data),
        folder=args.resume or args.adapter_path or Path("adapters"),
        resume=args.resume is not None,
        init_adapter=args.init_adapter,
        lora=lora_config(args),
        training=settings,
        iters=args.iters,
        epochs=args.epochs,
        mask_prompt=args.mask_prompt,
        max_seq_length=args.max_seq_length,
        steps_per_eval=args.steps_per_eval,
        save_every=args.save_every,
        patience=args.patience,
        num_questions=args.num_questions,
        compiled=args.compile,
    )
    console = Console(stderr=args.json, highlight=False, markup=False, soft_wrap=True)
    report = finetune(job, console)
    if args.json:
        print(json.dumps(report))


def evaluate(args: argparse.Namespace) -> None:
    for flag in ("batch_size", "max_seq_length"):
        require_at_least(1, flag, getattr(args, flag))
    conversations = read_conversations(data_folder(args.data) / "test.jsonl")
    loaded = load_with_adapter(args.model, args.adapter_path)
    examples = encode_all(loaded.tokenizer, conversations, args.mask_prompt, args.max_seq_length)
    batches = evaluation_batches(examples, args.batch_size)
    loss_nats, num_targets = evaluate_model(loaded.model, batches)
    if not loss_nats < MAX_NATS:
        raise ValueError(f"the loss must be a finite number below {MAX_NATS} nats, got {loss_nats}")
    result = {
        "loss_nats": loss_nats,
        "perplexity": math.exp(loss_nats),
        "num_targets": num_targets,
        "num_examples": len(examples),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{loaded.name}: {loss_nats:.4f} nats per target token, perplexity "
            f"{result['perplexity']:.3f} ({num_targets} targets in {len(examples)} examples)"
        )


def generate(args: argparse.Namespace) -> None:
    require_at_least(1, "max_tokens", args.max_tokens)
    require_seed("seed", args.seed)
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be finite and at least 0, got {args.temperature}")
    loaded = load_with_adapter(args.model, args.adapter_path)
    tokenizer = loaded.tokenizer
    if not is_text(args.prompt):
        raise ValueError("--prompt must be UTF-8 text")
    prompt_tokens = tokenizer.encode_prompt([{"role": "user", "content": args.prompt}])
    mx.random.seed(args.seed)
    tokens = list(
        generate_tokens(loaded.model, prompt_tokens, args.max_tokens, tokenizer.eos_id, args.temperature)
    )
    result = {
        "prompt": args.prompt,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "finish_reason": "length" if len(tokens) == args.max_tokens else "stop",
    }
    print(json.dumps(result) if args.json else result["text"])


def lora_config(args: argparse.Namespace) -> LoRAConfig | None:
    """The adapter that the flags describe; None when --init-adapter brings its own."""
    given = {flag: getattr(args, flag) for flag in LORA_FLAGS if getattr(args, flag) is not None}
    if args.init_adapter is not None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{flag} comes with the adapter of --init-adapter: give one of them")
        return None
    if given.get("target_modules", "all-linear") != "all-linear":
        given["target_modules"] = tuple(parts(given["target_modules"]))
    if "target_regex" in given:
        given["target_modules"] = given.pop("target_regex")
    for flag, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if flag in given:
            given[flag] = to_pattern(flag, given[flag], kind)
    return LoRAConfig(**given)


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def to_pattern(flag: str, text: str, kind: type) -> dict[str, int | float]:
    """NAME=NUMBER,NAME=NUMBER,... with every name once."""
    rows = [part.rpartition("=") for part in parts(text)]
    try:
        pattern = {name.strip(): kind(value) for name, _, value in rows}
    except ValueError:
        pattern = {}
    if not rows or "" in pattern or len(pattern) < len(rows):
        noun = "a whole number" if kind is int else "a number"
        flag = flag.replace("_", "-")
        raise ValueError(f"--{flag} must be NAME=N,NAME=N,..., each name once and N {noun}, got {text!r}")
    return pattern


def data_folder(path: Path | None) -> Path:
    if path is None and not GEOGRAPHY.is_dir():
        raise ValueError("the geography questions are not beside this package: give --data DIR")
    path = GEOGRAPHY if path is None else path
    if not path.is_dir():
        raise ValueError(f"--data must be a folder, got {path}")
    return path


def load_with_adapter(model: Path | None, adapter: Path | None) -> LoadedModel:
    loaded = load_model(model)
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return loaded


def require_at_least(least: int, flag: str, value: int) -> None:
    if value < least:
        raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
