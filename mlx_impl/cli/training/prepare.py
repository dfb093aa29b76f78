"""Reads and checks everything that a `train` command needs, before it writes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...data import Example, num_inputs
from ...disk.output_folder import require_no_overlap
from ...files.adapters import load_adapter
from ...files.checkpoint import LoadedModel, load_model
from ...files.precision import to_dtype
from ...run.memory_check import require_training_memory
from ...run.state import digest_of_examples, require_same
from ...run.trainer import LoRATrainer
from ...text.template_choice import digest_of
from ..screen.console import StatusLine
from . import manifest
from .answers import require_memory_for_questions
from .job import Job, PreparedJob, steps_per_eval, train_config
from .job_data import Asked, JobData, Limits, Questions, encode_data, questions_of, read_data
from .on_ranks import ReadOnlyFolder
from .run_folder import RunFolder, library_versions
from .samples import evenly_spaced


def prepare(job: Job, tell: StatusLine) -> PreparedJob:
    """Read and check everything, cheap checks first; ValueError for a wrong input.

    `tell` is told what is being done, before each part that can take seconds.
    """
    to_dtype(job.dtype)
    is_writer = job.ranks is None or job.ranks.rank == 0
    folder = (RunFolder if is_writer else ReadOnlyFolder)(job.folder)
    if not job.resume:
        require_separate_inputs(job)
    tell("reading the data")
    data = read_checked_data(job)
    tell("reading the model")
    template = replace(job.template, adapter=job.init_adapter)
    loaded = load_model(job.model, job.dequantize, job.dtype, template)
    folder.chat_template = loaded.tokenizer.replacement
    encoding = job.targets, job.max_seq_length, job.reasoning, job.reading.skip_bad
    encoded = encode_data(loaded, data, encoding, tell)
    tell("checking questions and memory")
    limits = Limits(job.num_questions, job.max_answer_tokens, job.max_seq_length)
    asked = questions_of(loaded, data, job.reading, job.reasoning, limits)
    train, valid, test = (encoded[kind].examples for kind in ("training", "validation", "test"))
    evaluated = evenly_spaced(valid, job.eval_examples)
    trainer = make_trainer(job, loaded, train, evaluated, asked.questions)
    if job.resume:
        load_training_state(folder, trainer, train)
    remarks = data.remarks + asked.remarks
    remarks += [remark for kind, file in encoded.items() for remark in file.remarks(kind)]
    remarks += require_memory(job, trainer, loaded, asked, (train, evaluated, test))
    return PreparedJob(job, loaded, folder, trainer, train, evaluated, len(valid), test, asked, remarks)


def read_checked_data(job: Job) -> JobData:
    """The rows; ValueError where the settings do not fit them, before a model is loaded."""
    data = read_data(job.data, job.reading, job.test)
    if job.patience and not data.valid:
        raise ValueError(f"--patience needs validation data, and {job.data} has no valid.jsonl")
    train_config(job, [job.max_seq_length] * len(data.train))
    return data


def require_memory(
    job: Job,
    trainer: LoRATrainer,
    loaded: LoadedModel,
    asked: Asked,
    examples: tuple[Sequence[Example], Sequence[Example], Sequence[Example]],
) -> list[str]:
    """Remarks on short memory; ValueError where training, evaluating or answering does not fit."""
    train, valid, test = examples
    evaluated = evenly_spaced(train, job.eval_examples), valid, test
    rows = [*asked.samples, *(c for group in asked.questions.values() for c in group)]
    return [
        *require_training_memory(trainer, train, *evaluated),
        *require_memory_for_questions(loaded, rows, job.plain, asked.max_tokens),
    ]


def require_same_on_all_ranks(prepared: PreparedJob) -> None:
    """ValueError, with its name, for a difference between the ranks."""
    job, trainer = prepared.job, prepared.trainer
    own = {"--save-every": job.save_every, "--plain": job.plain, "the saved step": trainer.step}
    if job.ranks is not None:
        job.ranks.require_same({**library_versions(), **own, **trainer.identity(prepared.train)})


def make_trainer(
    job: Job, loaded: LoadedModel, train: Sequence[Example], valid: Sequence[Example], questions: Questions
) -> LoRATrainer:
    """The trainer at step 0, with the initial adapter where there is one."""
    training = train_config(job, [num_inputs(example) for example in train])
    lora = job.lora
    if job.init_adapter is not None:
        lora = load_adapter(loaded.model, job.init_adapter)
    assert lora is not None
    trainer = LoRATrainer(loaded.model, lora, training, job.compiled, job.plain, job.ranks)
    trainer.resume_identity = {
        "eval_examples": job.eval_examples,
        "the validation data": digest_of_examples(valid),
        "the questions": {name: [c.question for c in group] for name, group in questions.items()},
        "steps_per_eval": steps_per_eval(job, training.iters),
        "patience": job.patience,
    }
    if loaded.tokenizer.replacement is not None:
        trainer.resume_identity["the chat template"] = digest_of(loaded.tokenizer.replacement)
    return trainer


def require_separate_inputs(job: Job) -> None:
    """ValueError where the run's folder is, contains or lies inside an input."""
    inputs = {"data": job.data, "initial adapter": job.init_adapter, "--config file": job.config}
    if job.model is not None and Path(job.model).exists():
        inputs["model"] = Path(job.model)
    given = {name: path for name, path in inputs.items() if path is not None}
    for name, path in list(given.items()):  # the files of an input may be links into other folders
        links = [file for file in path.iterdir() if file.is_symlink()] if path.is_dir() else []
        given |= {f"{name}'s file {file.name}": file.resolve() for file in links}
    require_no_overlap(job.folder, given)


def load_training_state(folder: RunFolder, trainer: LoRATrainer, examples: Sequence[Example]) -> None:
    """Load the last saved state; keep step 0 where the run was stopped before its first save."""
    started = manifest.read(folder.path)
    require_same(folder.path, started.identity, trainer.identity(examples))
    if folder.state.exists() or (folder.path / "adapter_model.safetensors").exists():
        trainer.resume(folder.state, examples)
