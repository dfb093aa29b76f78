"""Which flag is meant by one of another program, an abbreviation or a wrong spelling. No MLX import."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names of other programs that no rule below finds -> ours; the first that the command has is meant.
SYNONYMS = {
    "adapter": ("adapter-path", "init-adapter"),
    "adapter-file": ("adapter-path",),
    "base-model": ("model",),
    "bf16": ("dtype",),
    "checkpoint-path": ("adapter-path",),
    "cutoff-len": ("max-seq-length",),
    "dataset": ("data",),
    "dataset-path": ("data",),
    "data-path": ("data",),
    "data-dir": ("data",),
    "data-type": ("dtype",),
    "early-stopping": ("patience",),
    "early-stopping-patience": ("patience",),
    "eval-steps": ("steps-per-eval",),
    "eval-every": ("steps-per-eval",),
    "from-adapter": ("init-adapter",),
    "gradient-accumulation": ("grad-accumulation-steps",),
    "gradient-accumulation-steps": ("grad-accumulation-steps",),
    "gradient-checkpointing": ("grad-checkpoint",),
    "group-by-length": ("batching",),
    "initial-learning-rate": ("learning-rate",),
    "iterations": ("iters",),
    "length": ("max-seq-length", "max-tokens"),
    "load-adapter": ("init-adapter",),
    "lora-layers": ("num-layers",),
    "lora-r": ("rank",),
    "lora-scale": ("alpha",),
    "lora-target": ("target-modules",),
    "lora-target-modules": ("target-modules",),
    "lr-scheduler": ("lr-schedule",),
    "lr-scheduler-type": ("lr-schedule",),
    "max-length": ("max-seq-length", "max-tokens"),
    "max-new-tokens": ("max-tokens",),
    "max-seq-len": ("max-seq-length",),
    "max-steps": ("iters",),
    "message": ("prompt",),
    "model-id": ("model",),
    "model-name": ("model",),
    "model-name-or-path": ("model",),
    "model-path": ("model",),
    "n-epochs": ("epochs",),
    "n-layers": ("num-layers",),
    "num-epochs": ("epochs",),
    "num-iters": ("iters",),
    "num-steps": ("iters",),
    "num-train-epochs": ("epochs",),
    "out": ("save-path", "adapter-path"),
    "out-dir": ("save-path", "adapter-path"),
    "output": ("save-path", "adapter-path"),
    "output-dir": ("save-path", "adapter-path"),
    "output-path": ("save-path", "adapter-path"),
    "packing": ("batching",),
    "per-device-train-batch-size": ("batch-size",),
    "precision": ("dtype",),
    "r": ("rank",),
    "resume-adapter-file": ("init-adapter",),
    "resume-from-checkpoint": ("resume",),
    "resume-from": ("resume",),
    "sample-packing": ("batching",),
    "save-dir": ("save-path", "adapter-path"),
    "save-steps": ("save-every",),
    "scale": ("alpha",),
    "scheduler": ("lr-schedule",),
    "seq-len": ("max-seq-length",),
    "seq-length": ("max-seq-length",),
    "steps": ("iters",),
    "system-prompt": ("system",),
    "temp": ("temperature",),
    "train-on-completions": ("targets", "mask-prompt"),
    "train-steps": ("iters",),
    "use-adapter": ("adapter-path",),
    "val-batches": ("eval-examples",),
    "test-batches": ("test",),
    "warmup": ("warmup-steps",),
    "warmup-ratio": ("warmup-steps",),
    "wandb": ("report-to",),
    "logger": ("report-to",),
    "project-name": ("report-to",),
}

# Flags of other programs, chiefly of mlx_lm.lora, that need none here.
NOT_NEEDED = {
    "clear-cache-threshold": "memory stays flat without it",
    "fine-tune-type": "LoRA needs no flag, DoRA is --use-dora",
    "load-in-4bit": "a quantized model is read as it is",
    "lora-parameters": "its keys are settings of their own: rank, dropout, and alpha, which is scale * rank",
    "steps-per-report": "metrics.jsonl has every step",
    "trust-remote-code": "no code of a model is run",
}


def hint(given: str, known: Iterable[str], noun: str) -> str:
    """What to write instead of an unknown flag or key, as the end of a message; "" where nothing fits."""
    if sentence := NOT_NEEDED.get(spelled(given)):
        return f": leave it out, {sentence}"
    found = meant_flag(given, known)
    return f"; the closest {noun} is {found}" if found else ""


def meant_flag(given: str, known: Iterable[str]) -> str | None:
    """The known name that is meant; None where nothing is like it.

    By turns: another spelling, another program's name, the initials (`lr`), a longer name that ends in a
    known one (`lora-alpha`), a shorter one that begins it, and the name with the most letters in common.
    """
    names = {spelled(name): name for name in known}
    word = spelled(given)
    found = [word, *SYNONYMS.get(word, ()), *(name for name in names if initials(name) == word)]
    found += sorted((name for name in names if word.endswith(f"-{name}")), key=len, reverse=True)
    found += [name for name in names if len(word) > 2 and name.startswith(word)]
    found += difflib.get_close_matches(word, list(names), 1)
    return next((names[name] for name in found if name in names), None)


def spelled(name: str) -> str:
    return name.strip("-").replace("_", "-").casefold()


def initials(name: str) -> str:
    words = name.split("-")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
