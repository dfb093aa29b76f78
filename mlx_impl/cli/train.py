"""`train`: fine-tune a model, and show by questions asked before and after what it has learned."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BATCHINGS, TrainConfig
from .settings import flags
from .settings.flags import TRAIN_DEFAULTS, add_json_flag, folder, number, require_at_least, switch
from .settings.lora_flags import add_lora_flags, lora_config
from .settings.settings import resolved

if TYPE_CHECKING:
    from .training.job import Job

HELP = "fine-tune a model and show what it learned"
DEFAULT_EPOCHS = 5
AT_LEAST_ONE = ("batch_size", "grad_accumulation_steps", "max_seq_length", "steps_per_eval", "save_every")


def add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read settings from a .yaml or .toml file, keys named as the flags; the command line wins "
        "(default: none)",
    )
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    flags.add_data_flags(command.add_argument_group("data"))
    add_lora_flags(command.add_argument_group("adapter"))
    add_step_flags(command.add_argument_group("training"))
    add_run_flags(command.add_argument_group("run"))


def add_step_flags(group: Any) -> None:
    defaults = TRAIN_DEFAULTS
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--iters", type=int, metavar="N", help="optimizer updates (default: as many as the epochs take)"
    )
    number(length, "--epochs", DEFAULT_EPOCHS, "passes over the training file")
    group.add_argument(
        "--batching",
        choices=BATCHINGS,
        default=defaults.batching,
        help="against padding: examples of like length together, or several a row (default: %(default)s)",
    )
    number(group, "--grad-accumulation-steps", defaults.grad_accumulation_steps, "batches an update")
    number(group, "--learning-rate", defaults.learning_rate, "at its highest")
    group.add_argument(
        "--lr-schedule",
        choices=("constant", "linear", "cosine"),
        default=defaults.lr_schedule,
        help="after the warmup: stay, or go down to 0 (default: %(default)s)",
    )
    number(group, "--warmup-steps", defaults.warmup_steps, "updates in which the learning rate rises from 0")
    number(group, "--loraplus-lr-ratio", defaults.loraplus_lr_ratio, "LoRA+: B learns so many times as fast")
    group.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default=defaults.optimizer,
        help="as PyTorch defines them (default: %(default)s)",
    )
    number(group, "--weight-decay", defaults.weight_decay, "of the adapter")
    number(group, "--max-grad-norm", defaults.max_grad_norm, "clip the gradient to this norm; 0: never")
    switch(
        group,
        "--grad-checkpoint",
        defaults.grad_checkpoint,
        "compute activations twice instead of keeping them: less memory (default: no)",
    )
    number(group, "--seed", defaults.seed, "of the initial adapter and of dropout")
    number(group, "--data-seed", None, "of the order of the examples", "the --seed")
    switch(group, "--compile", None, "compile the training step (default: on a GPU)")


def add_run_flags(group: Any) -> None:
    folder(
        group,
        "--adapter-path",
        "the run's folder, new or empty: adapter, metrics, report (default: adapters, or the first of "
        "adapters-2, adapters-3, ... that is free)",
    )
    switch(
        group,
        "--overwrite",
        False,
        "replace the finished run in --adapter-path; only files that it wrote are removed (default: no)",
    )
    folder(
        group,
        "--resume",
        "go on with the run in this folder, to the bit as if it had not been stopped; model, data and "
        "settings come from it (default: a new run)",
    )
    number(group, "--save-every", 25, "steps between savings of adapter and training state")
    number(group, "--steps-per-eval", 25, "steps between validations")
    number(group, "--patience", 0, "stop after so many validations without a better loss; 0: never")
    number(
        group,
        "--eval-examples",
        200,
        "compute the loss before, after and in validations over at most N examples, evenly spread; -1: all",
    )
    number(group, "--num-questions", None, "ask at most N questions of each file before and after", "all")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from .screen.console import make_console
    from .training.finetune import finetune

    require_numbers(args)
    with run_folder(args) as path:
        report = finetune(job_of(args, path), make_console(stderr=args.json))
    if args.json:
        print(json.dumps(report))


def require_numbers(args: argparse.Namespace) -> None:
    for flag in AT_LEAST_ONE:
        require_at_least(1, flag, getattr(args, flag))
    for flag in ("patience", "num_questions"):
        require_at_least(0, flag, getattr(args, flag) or 0)
    if args.eval_examples != -1 and args.eval_examples < 1:
        raise ValueError(f"--eval-examples must be at least 1, or -1 for all, got {args.eval_examples}")


def run_folder(args: argparse.Namespace) -> AbstractContextManager[Path]:
    """The folder that the run has to itself within the block."""
    from .training.run_place import place_for_a_run, run_to_resume

    if args.resume is not None:
        return run_to_resume(run_path("--resume", args.resume))
    if args.overwrite and args.adapter_path is None:
        raise ValueError("--overwrite needs the --adapter-path of a finished run")
    path = None if args.adapter_path is None else run_path("--adapter-path", args.adapter_path)
    return place_for_a_run(path, args.overwrite)


def run_path(flag: str, path: Path) -> Path:
    """One that can be named in a command, whatever has been moved since."""
    if not str(path).isprintable():
        raise ValueError(f"{flag} must be a printable path, got {str(path)!r}")
    return Path(os.path.realpath(path)) if ".." in path.parts else path


def job_of(args: argparse.Namespace, path: Path) -> Job:
    from .training.job import Job

    settings = {
        field.name: getattr(args, field.name) for field in fields(TrainConfig) if field.name != "iters"
    }
    if args.data_seed is None:
        settings["data_seed"] = args.seed
    lora = lora_config(args)
    # Of two spellings of the targets the one that says all.
    named = {"data_seed": settings["data_seed"], "targets": flags.targets(args), "mask_prompt": None}
    return Job(
        model=args.model,
        dequantize=args.dequantize,
        dtype=args.dtype,
        data=flags.data_folder(args.data),
        folder=path,
        resume=args.resume is not None,
        init_adapter=args.init_adapter,
        config=args.config,
        lora=lora,
        training=settings,
        iters=args.iters,
        epochs=args.epochs,
        targets=flags.targets(args),
        max_seq_length=args.max_seq_length,
        steps_per_eval=args.steps_per_eval,
        save_every=args.save_every,
        patience=args.patience,
        num_questions=args.num_questions,
        eval_examples=args.eval_examples,
        compiled=args.compile,
        settings=resolved(args, lora, **named),
        blas=args.blas,
    )
