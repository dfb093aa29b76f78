"""`evaluate`: the loss over the test file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .settings import flags
from .settings.flags import add_folder, add_json_flag, require_at_least

if TYPE_CHECKING:
    from rich.console import Console

    from ..data import Example
    from ..files.checkpoint import LoadedModel
    from ..model import CausalLM
    from ..text.examples import Encoded

HELP = "compute the loss over the test file"
MAX_NATS = 700.0  # above it exp, the perplexity, overflows


def add_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    flags.add_template_flags(model)
    flags.add_data_flags(command.add_argument_group("data"))
    group = command.add_argument_group("evaluation")
    add_folder(group, "--adapter-path", "evaluate with this adapter (default: none)")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..run.memory_check import require_evaluation_memory
    from .screen.console import make_console

    console = make_console(stderr=True)
    loaded, encoded, remarks = read(args, console)
    remarks += require_evaluation_memory(loaded.model, encoded.examples, args.batch_size)
    for remark in remarks:
        console.print(remark)
    result = evaluate_examples(loaded.model, encoded.examples, args.batch_size, console)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{loaded.name}: {result['loss_nats']:.4f} nats per target token, perplexity "
        f"{result['perplexity']:.3f} ({result['num_targets']} targets in {len(encoded.examples)} examples)"
    )


def read(args: argparse.Namespace, console: Console) -> tuple[LoadedModel, Encoded, list[str]]:
    """The model, the test examples, and remarks on rows that were skipped, cut or left out."""
    from ..files.adapters import load_with_adapter
    from ..files.precision import to_dtype
    from ..text.examples import encode_file
    from ..text.splits import read_split
    from .screen.console import progress_of, show_status

    for flag in ("batch_size", "max_seq_length"):
        require_at_least(1, flag, getattr(args, flag))
    to_dtype(args.dtype)
    template, encoding = flags.template_of(args), flags.encoding_of(args)
    data = read_split(flags.data_folder(args.data), "test", flags.reading_of(args))
    with show_status("reading the model", console):
        loaded = load_with_adapter(args.model, args.adapter_path, args.dequantize, args.dtype, template)
    progress = progress_of("encoding", console)
    encoded = encode_file(loaded.tokenizer, data.conversations, *encoding, progress=progress)
    return loaded, encoded, data.remarks("test") + encoded.remarks("test")


def evaluate_examples(
    model: CausalLM, examples: Sequence[Example], batch_size: int, console: Console
) -> dict[str, Any]:
    """The object that --json prints; ValueError for a loss that is not finite."""
    from ..data import evaluation_batches
    from ..fast.forward import FAST
    from ..train import evaluate
    from .screen.console import show_progress

    batches = evaluation_batches(examples, batch_size)
    num_batches = -(-len(examples) // batch_size)
    progress = show_progress(batches, num_batches, "evaluating", console)
    loss_nats, num_targets = evaluate(model, progress, FAST)
    if not loss_nats < MAX_NATS:
        raise ValueError(f"the loss must be a finite number below {MAX_NATS} nats, got {loss_nats}")
    return {
        "loss_nats": loss_nats,
        "perplexity": math.exp(loss_nats),
        "num_targets": num_targets,
        "num_examples": len(examples),
    }
