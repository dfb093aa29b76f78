"""The flags of `train` for the run: folder, ranks, evaluations, questions, reports. No MLX import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .flags import add_folder, add_json_flag, add_number, add_switch


def add_run_flags(group: Any) -> None:
    add_folder_flags(group)
    add_rank_flags(group)
    add_number(group, "--save-every", 25, "save the adapter and the training state every N updates")
    add_evaluation_flags(group)
    add_question_flags(group)
    add_report_flags(group)
    group.add_argument(
        "--train",
        action="store_true",
        default=True,
        help="changes nothing; allowed because commands of mlx_lm.lora have it (default: yes)",
    )
    add_json_flag(group)


def add_folder_flags(group: Any) -> None:
    add_folder(
        group,
        "--adapter-path",
        "folder for the run's adapter, metrics and report; new or empty (default: the first free one of "
        "adapters, adapters-2, adapters-3, ...)",
    )
    add_switch(
        group,
        "--overwrite",
        False,
        "replace the finished run in --adapter-path; removes only files that it wrote (default: no)",
    )
    add_folder(
        group,
        "--resume",
        "resume the stopped run in this folder bit-exactly, with its model, data and settings "
        "(default: start a new run)",
    )


def add_rank_flags(group: Any) -> None:
    add_switch(
        group,
        "--distributed",
        False,
        "share out each update's micro-batches over the processes that mlx.launch has started, one on each "
        "machine or GPU (default: no)",
    )
    add_switch(
        group,
        "--ordered-sums",
        True,
        "with --distributed: add up in the order of the micro-batches, so that any number of processes gives "
        "the same bits; with --no-ordered-sums they send less, and the last bits differ (default: yes)",
    )


def add_evaluation_flags(group: Any) -> None:
    add_number(
        group,
        "--steps-per-eval",
        None,
        "compute the validation loss every N updates",
        "about ten times a run",
    )
    add_number(
        group, "--patience", 0, "early stopping: stop after N validations without a better loss; 0: never"
    )
    add_number(
        group,
        "--eval-examples",
        200,
        "compute the losses before, after and in validation over at most N examples, evenly spaced; -1: all",
    )
    group.add_argument(
        "--test",
        nargs="?",
        const=True,
        type=file_path,
        metavar="FILE",
        help="at the end compute the loss over all rows of FILE; without FILE, of the data's test file "
        "(default: none)",
    )


def add_report_flags(group: Any) -> None:
    group.add_argument(
        "--report-to",
        metavar="tensorboard|wandb",
        help="send the figures of every step there; to both: tensorboard,wandb (default: none)",
    )
    group.add_argument(
        "--project-name", metavar="NAME", help="the project in Weights & Biases (default: mlx-lora)"
    )


def file_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a file, got an empty text")
    return Path(text)


def add_question_flags(group: Any) -> None:
    add_number(group, "--num-questions", None, "ask at most N questions of each file before and after", "all")
    add_number(
        group,
        "--max-answer-tokens",
        None,
        "longest answer to a question, in tokens; one that is longer counts as cut",
        "what the longest reply of the data needs",
    )
    add_number(group, "--sample-every", 0, "show answers to a few held-out rows every N updates; 0: never")
