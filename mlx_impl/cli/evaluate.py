"""`evaluate`: the loss over the test file."""

from __future__ import annotations

import argparse
import json
import math

from .settings import flags
from .settings.flags import add_json_flag, folder, require_at_least, targets

HELP = "the loss over the test file"
MAX_NATS = 700.0  # of which exp is still a float


def add_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    flags.add_data_flags(command.add_argument_group("data"))
    group = command.add_argument_group("evaluation")
    folder(group, "--adapter-path", "with this adapter (default: none)")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..data import evaluation_batches
    from ..files.adapters import load_with_adapter
    from ..files.precision import to_dtype
    from ..run.memory_check import require_evaluation
    from ..text.examples import encode_file
    from ..text.rows import read_conversations
    from ..train import evaluate
    from .screen.console import counted, make_console, working

    for flag in ("batch_size", "max_seq_length"):
        require_at_least(1, flag, getattr(args, flag))
    to_dtype(args.dtype)
    conversations = read_conversations(flags.data_folder(args.data) / "test.jsonl")
    console = make_console(stderr=True)
    with working("reading the model", console):
        loaded = load_with_adapter(args.model, args.adapter_path, args.dequantize, args.dtype)
    encoded = encode_file(loaded.tokenizer, conversations, targets(args), args.max_seq_length)
    examples = encoded.examples
    for remark in encoded.remarks("test") + require_evaluation(loaded.model, examples, args.batch_size):
        console.print(remark)
    batches = evaluation_batches(examples, args.batch_size)
    num_batches = -(-len(examples) // args.batch_size)
    shown = counted(batches, num_batches, "evaluating", console)
    loss_nats, num_targets = evaluate(loaded.model, shown)
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
