"""`train`: fine-tune a model, and ask it questions before and after to show what it learned."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..machine.cuda import launch_kernels_one_by_one
from .launcher import is_first
from .settings import flags
from .settings.flags import require_at_least
from .settings.lora_flags import add_lora_flags, lora_config
from .settings.precedence import resolved_settings
from .settings.run_flags import add_run_flags
from .settings.train_flags import add_training_flags

if TYPE_CHECKING:
    from ..run.ranks import Ranks
    from .training.job import Job

HELP = "fine-tune a model with LoRA and show what it learned"
AT_LEAST_ONE = ("batch_size", "grad_accumulation_steps", "max_seq_length", "save_every")
AT_LEAST_ONE_IF_GIVEN = ("steps_per_eval", "max_answer_tokens")


def add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="read settings from a .yaml or .toml file whose keys are the flags' names; flags on the command "
        "line win (default: none)",
    )
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    flags.add_template_flags(model)
    flags.add_data_flags(command.add_argument_group("data"))
    add_lora_flags(command.add_argument_group("adapter"))
    add_training_flags(command.add_argument_group("training"))
    add_run_flags(command.add_argument_group("run"))


def run(args: argparse.Namespace) -> None:
    launch_kernels_one_by_one()
    from .screen.console import make_console
    from .training.finetune import finetune

    ranks = None
    if args.distributed:  # before anything is checked: a rank that ends now would be waited for
        from ..run.ranks import join_ranks

        ranks = join_ranks(in_order=args.ordered_sums)
    require_numbers(args)
    reserved = reserved_folder(args)
    if ranks:
        from .training.on_ranks import shared_folder

        reserved = shared_folder(ranks, reserved)
    with reserved as path:
        report = finetune(job_of(args, path, ranks), make_console(stderr=args.json, quiet=not is_first()))
    if args.json:
        print(json.dumps(report))


def require_numbers(args: argparse.Namespace) -> None:
    for flag in AT_LEAST_ONE:
        require_at_least(1, flag, getattr(args, flag))
    for flag in AT_LEAST_ONE_IF_GIVEN:
        if getattr(args, flag) is not None:
            require_at_least(1, flag, getattr(args, flag))
    for flag in ("patience", "num_questions", "sample_every"):
        require_at_least(0, flag, getattr(args, flag) or 0)
    if args.eval_examples != -1 and args.eval_examples < 1:
        raise ValueError(f"--eval-examples must be at least 1, or -1 for all, got {args.eval_examples}")


def reserved_folder(args: argparse.Namespace) -> AbstractContextManager[Path]:
    """Within the block no other process can use the run's folder."""
    from .training.reservation import reserve_folder, reserve_to_resume

    if args.resume is not None:
        return reserve_to_resume(run_path("--resume", args.resume))
    if args.overwrite and args.adapter_path is None:
        raise ValueError("--overwrite needs the --adapter-path of a finished run")
    path = None if args.adapter_path is None else run_path("--adapter-path", args.adapter_path)
    return reserve_folder(path, args.overwrite)


def run_path(flag: str, path: Path) -> Path:
    """The path as it is printed in the command to resume with; `..` is resolved while it is valid."""
    if not str(path).isprintable():
        raise ValueError(f"{flag} must be a printable path, got {str(path)!r}")
    return Path(os.path.realpath(path)) if ".." in path.parts else path


def job_of(args: argparse.Namespace, path: Path, ranks: Ranks | None = None) -> Job:
    """The job that the flags describe. A field that is not computed here is the flag of the same name."""
    from .training.job import Job
    from .training.trackers import tracker_names

    training = train_settings(args)
    lora, targets = lora_config(args), flags.targets_of(args)
    # --mask-prompt is saved as --targets, which can say everything.
    saved = {"data_seed": training["data_seed"], "targets": targets, "mask_prompt": None}
    computed = {
        "data": flags.data_folder(args.data),
        "folder": path,
        "resume": args.resume is not None,
        "lora": lora,
        "training": training,
        "targets": targets,
        "reading": flags.reading_of(args),
        "template": flags.template_of(args),
        "compiled": args.compile,
        "report_to": tracker_names(args.report_to),
        "ranks": ranks,
        "settings": resolved_settings(args, lora, **saved),
    }
    copied = {f.name: getattr(args, f.name) for f in fields(Job) if f.name not in computed}
    return Job(**computed, **copied)


def train_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig except iters, which may depend on the data."""
    settings = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if f.name != "iters"}
    if args.data_seed is None:
        settings["data_seed"] = args.seed
    return settings
