"""`inspect`: which tokens are targets, the lengths of the examples, the padding of a batch; or what fits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BATCHINGS, TrainConfig
from . import fit
from .settings import flags
from .settings.flags import add_json_flag, add_number, require_at_least, targets_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..data import Example
    from ..text.examples import Encoded
    from ..text.rows import DataFile, Reading
    from ..text.tokenizer import ChatTokenizer

HELP = "show which tokens are trained on, or which batches fit into memory; reads no weights"
FILES = ("train", "valid", "test")
MAX_BINS, MAX_BAR = 10, 40  # of the histogram of lengths: rows, and characters of the longest bar


def add_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    flags.add_model_flag(model)
    flags.add_template_flags(model)
    flags.add_data_flags(command.add_argument_group("data"))
    group = command.add_argument_group("inspection")
    add_number(group, "--num-examples", 3, "how many training examples to print, and how many dropped rows")
    add_number(
        group, "--num-tokens", 40, "how many tokens of each to print, from a little before its first target"
    )
    add_json_flag(group)
    fit.add_fit_flags(command.add_argument_group("memory"))


def run(args: argparse.Namespace) -> None:
    if args.fit:
        fit.run(args)
    elif args.memory is not None:
        raise ValueError("--memory needs --fit, which says what fits into it")
    else:
        inspect_data(args)


def inspect_data(args: argparse.Namespace) -> None:
    from ..files.checkpoint import load_tokenizer
    from ..text.data_folder import require_files
    from .screen.console import make_console

    for flag, least in (("batch_size", 1), ("max_seq_length", 1), ("num_examples", 0), ("num_tokens", 0)):
        require_at_least(least, flag, getattr(args, flag))
    folder, template = flags.data_folder(args.data), flags.template_of(args)
    files = read_files(folder, flags.reading_of(args))
    tokenizer = load_tokenizer(args.model, template)
    encoded = encode_files(files, tokenizer, flags.encoding_of(args))
    result = inspection(args, tokenizer, files, encoded)
    if args.json:
        print(json.dumps(result))
        return
    console = make_console(stderr=False)
    print_inspection(result, require_files(folder, "train")[0], console)
    for name, file in files.items():
        more = encoded[name].remarks(name) if name in encoded else []
        for remark in file.remarks(name) + more:
            console.print(remark)


def read_files(folder: Path, reading: Reading) -> dict[str, DataFile]:
    from ..text.splits import read_optional_split, read_split

    files = {"train": read_split(folder, "train", reading)}
    return files | {name: read_optional_split(folder, name, reading) for name in FILES[1:]}


def encode_files(
    files: dict[str, DataFile], tokenizer: ChatTokenizer, encoding: tuple[str, int, str, bool]
) -> dict[str, Encoded]:
    """The examples of each file that has rows."""
    from ..text.examples import encode_file
    from .screen.console import make_console, progress_of

    progress = progress_of("encoding", make_console(stderr=True))
    return {
        name: encode_file(tokenizer, file.conversations, *encoding, progress=progress)
        for name, file in files.items()
        if file.conversations
    }


def inspection(
    args: argparse.Namespace,
    tokenizer: ChatTokenizer,
    files: dict[str, DataFile],
    encoded: dict[str, Encoded],
) -> dict[str, Any]:
    """The object that --json prints."""
    from .screen.examples import first_dropped, first_examples, spans_of

    train, rows, count = encoded["train"].examples, files["train"].conversations, args.num_examples
    marking = targets_of(args), args.reasoning
    return {
        "files": {name: file_statistics(files[name], file) for name, file in encoded.items()},
        "lengths": histogram([len(example.tokens) for example in train]),
        "padding": {batching: padding_fraction(train, batching, args) for batching in BATCHINGS},
        "examples": [spans_of(tokenizer, example) for example in train[:count]],
        "shown": first_examples(tokenizer, rows, encoded["train"], marking, count, args.num_tokens),
        "dropped": {
            name: first_dropped(tokenizer, files[name].conversations, file, files[name].bad, marking, count)
            for name, file in encoded.items()
        },
    }


def file_statistics(data: DataFile, file: Encoded) -> dict[str, Any]:
    return {
        "num_examples": len(file.examples),
        "num_tokens": sum(len(example.tokens) for example in file.examples),
        "num_targets": sum(sum(example.is_target[1:]) for example in file.examples),
        "num_cut": file.num_cut,
        "left_out": list(file.left_out),
        "skipped": [*data.bad, *file.bad],
        "unused_columns": list(data.unused),
    }


def histogram(lengths: list[int]) -> list[dict[str, int]]:
    """How many examples have `first` to `last` tokens, in at most MAX_BINS bins of equal width."""
    start = min(lengths) - 1
    width = -(-(max(lengths) - start) // MAX_BINS)
    return [
        {"first": i + 1, "last": i + width, "count": sum(i < length <= i + width for length in lengths)}
        for i in range(start, max(lengths), width)
    ]


def padding_fraction(examples: Sequence[Example], batching: str, args: argparse.Namespace) -> float:
    """The fraction of an epoch's inputs that is padding, in the batches that `train` would make."""
    from ..batching import updates_an_epoch
    from ..data import num_inputs, training_windows

    sizes = {"batch_size": args.batch_size, "max_seq_length": args.max_seq_length}
    lengths = [num_inputs(example) for example in examples]
    steps = updates_an_epoch(lengths, TrainConfig(iters=1, batching=batching, **sizes))
    windows = training_windows(examples, TrainConfig(iters=steps, batching=batching, **sizes))
    batches = [(batch.inputs_BT.size, batch.num_tokens) for window in windows for batch in window]
    return 1 - sum(tokens for _, tokens in batches) / sum(size for size, _ in batches)


def print_inspection(result: dict[str, Any], path: Path, console: Console) -> None:
    from .screen.console import printable
    from .screen.examples import print_examples

    print_examples(result["examples"], result.get("shown", []), str(path), console)
    for name, sentences in result.get("dropped", {}).items():
        for sentence in sentences:
            console.print(f"{name}, dropped: {printable(sentence)}")
    for name, file in result["files"].items():
        fraction = file["num_targets"] / file["num_tokens"]
        console.print(
            f"{name}: {file['num_examples']:,} examples, {file['num_tokens']:,} tokens, "
            f"{file['num_targets']:,} targets ({fraction:.0%})"
        )
    print_histogram(result["lengths"], console)
    fractions = ", ".join(f"{batching} {padding:.1%}" for batching, padding in result["padding"].items())
    console.print(f"padding in the training batches, by --batching: {fractions}")


def print_histogram(rows: list[dict[str, int]], console: Console) -> None:
    most = max(row["count"] for row in rows)
    console.print("training examples by their number of tokens")
    for row in rows:
        bar = "#" * -(-row["count"] * MAX_BAR // most)
        console.print(f"{row['first']:>7} - {row['last']:<7} {row['count']:>7}  {bar}".rstrip())
