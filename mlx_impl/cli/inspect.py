"""`inspect`: what of the data is trained, how long the examples are, and what padding costs."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BATCHINGS, TrainConfig
from .settings import flags
from .settings.flags import add_json_flag, number, require_at_least, targets

if TYPE_CHECKING:
    from rich.console import Console

    from ..data import Example
    from ..text.examples import Encoded
    from ..text.tokenizer import ChatTokenizer

HELP = "show what of the data is trained: no weights are read"
FILES = ("train", "valid", "test")
BINS, BAR = 10, 40  # of the histogram of lengths; characters of its longest bar
OPEN, CLOSE = "[[", "]]"  # around targets, where there is no colour

Part = tuple[str, bool]  # a text, and whether it is a target


def add_flags(command: argparse.ArgumentParser) -> None:
    flags.add_model_flag(command.add_argument_group("model"))
    flags.add_data_flags(command.add_argument_group("data"))
    group = command.add_argument_group("inspection")
    number(group, "--num-examples", 3, "of the training file to show")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..files.checkpoint import load_tokenizer
    from ..text.examples import encode_file
    from ..text.rows import read_conversations
    from .screen.console import make_console

    for flag, least in (("batch_size", 1), ("max_seq_length", 1), ("num_examples", 0)):
        require_at_least(least, flag, getattr(args, flag))
    paths = {name: flags.data_folder(args.data) / f"{name}.jsonl" for name in FILES}
    files = {n: read_conversations(path) for n, path in paths.items() if path.exists() or n == "train"}
    tokenizer = load_tokenizer(args.model)
    encoded = {
        n: encode_file(tokenizer, rows, targets(args), args.max_seq_length) for n, rows in files.items()
    }
    train = encoded["train"].examples
    result = {
        "files": {name: describe(file) for name, file in encoded.items()},
        "lengths": histogram([len(example.tokens) for example in train]),
        "padding": {kind: padding_share(train, kind, args) for kind in BATCHINGS},
        "examples": [parts_of(tokenizer, example) for example in train[: args.num_examples]],
    }
    if args.json:
        print(json.dumps(result))
        return
    console = make_console(stderr=False)
    show(result, paths["train"], console)
    for name, file in encoded.items():
        for remark in file.remarks(name):
            console.print(remark)


def describe(file: Encoded) -> dict[str, Any]:
    return {
        "num_examples": len(file.examples),
        "num_tokens": sum(len(example.tokens) for example in file.examples),
        "num_targets": sum(sum(example.is_target[1:]) for example in file.examples),
        "num_cut": file.num_cut,
        "left_out": list(file.left_out),
    }


def histogram(lengths: list[int]) -> list[dict[str, int]]:
    """How many examples have from `first` to `last` tokens, in at most BINS steps of one width."""
    least = min(lengths) - 1
    width = -(-(max(lengths) - least) // BINS)
    return [
        {"first": i + 1, "last": i + width, "count": sum(i < length <= i + width for length in lengths)}
        for i in range(least, max(lengths), width)
    ]


def padding_share(examples: list[Example], batching: str, args: argparse.Namespace) -> float:
    """The share of an epoch's inputs that are padding, in batches made as `train` makes them."""
    from ..batching import updates_an_epoch
    from ..data import num_inputs, training_windows

    sizes = {"batch_size": args.batch_size, "max_seq_length": args.max_seq_length}
    lengths = [num_inputs(example) for example in examples]
    steps = updates_an_epoch(lengths, TrainConfig(iters=1, batching=batching, **sizes))
    windows = training_windows(examples, TrainConfig(iters=steps, batching=batching, **sizes))
    batches = [(batch.inputs_BT.size, batch.num_tokens) for window in windows for batch in window]
    return 1 - sum(tokens for _, tokens in batches) / sum(size for size, _ in batches)


def parts_of(tokenizer: ChatTokenizer, example: Example) -> list[Part]:
    """The example's text, cut where targets begin and end. The first token is never predicted."""
    marks = zip(example.tokens, (False, *example.is_target[1:]), strict=True)
    runs = groupby(marks, key=lambda mark: mark[1])
    return [
        (tokenizer.decode_with_special([token for token, _ in run]), is_target) for is_target, run in runs
    ]


def show(result: dict[str, Any], path: Path, console: Console) -> None:
    from rich.text import Text

    from .screen.console import harmless

    is_coloured = console.color_system is not None and not console.no_color
    meaning = "targets are green" if is_coloured else f"targets stand between {OPEN} and {CLOSE}"
    if result["examples"]:
        console.print(f"{path}, the first examples; {meaning}")
    for parts in result["examples"]:
        text = Text()
        for part, is_target in parts:
            marked = f"{OPEN}{part}{CLOSE}" if is_target and not is_coloured else part
            text.append(harmless(marked), "green" if is_target else "dim")
        console.print(text, end="\n\n")
    for name, file in result["files"].items():
        share = file["num_targets"] / file["num_tokens"]
        console.print(
            f"{name}: {file['num_examples']:,} examples, {file['num_tokens']:,} tokens, "
            f"{file['num_targets']:,} targets ({share:.0%})"
        )
    most = max(row["count"] for row in result["lengths"])
    console.print("tokens of the training examples")
    for row in result["lengths"]:
        bar = "#" * -(-row["count"] * BAR // most)
        console.print(f"{row['first']:>7} - {row['last']:<7} {row['count']:>7}  {bar}".rstrip())
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in result["padding"].items())
    console.print(f"padding in a training batch, by --batching: {shares}")
