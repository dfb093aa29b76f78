"""Adapters for `mlx_impl`, with every capability: the trainer that ships, and the plain pattern alone.

Both train, evaluate, save and resume through `LoRATrainer`, as a user does.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

import mlx_impl.fast.ops
import mlx_impl.ops
from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch, Example
from mlx_impl.fast.answer import generate
from mlx_impl.fast.decode import generate_all
from mlx_impl.fast.head import head_nats
from mlx_impl.fast.vectors import VectorOptimizer, as_factors
from mlx_impl.files.adapters import load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_tokenizer
from mlx_impl.files.quantized import Quantization, quantize_modules
from mlx_impl.generate import generate as plain_generate
from mlx_impl.lora import add_lora, dense_weight_OI, lora_layers, lora_parameters
from mlx_impl.loss import next_token_nats
from mlx_impl.model import CausalLM
from mlx_impl.optim import learning_rate_of
from mlx_impl.run import trainer as run_trainer
from mlx_impl.run.guard import FiniteGuard
from mlx_impl.run.merging import Merged, merge, unmerge
from mlx_impl.run.ranks import Ranks
from mlx_impl.run.sampling import Sampling
from mlx_impl.run.state import save_state
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.text.examples import encode_all
from mlx_impl.text.rows import read_conversations
from mlx_impl.train import Loss, StepRecord, apply_mean
from tests.lora_ladder.protocol import Arrays, Dialect, Examples
from tests.ring import outputs, start
from tests.trainers.exact_ops import in_place_of_production
from tests.trainers.given_masks import with_given_masks

NOT_OF_THE_BASE = ("lora_a", "lora_b", "magnitude", "keep_BTI")  # the factors, and the given dropout masks

SLOW = 0.5  # seconds that a rank takes to write, in `save_on_ranks`

# Stands for the data set in a saved state where the ladder hands over batches.
DATA = [Example((1, 2), (False, True))]


class Tap:
    """Wraps a module and records its output."""

    def __init__(self, module: Callable, name: str, notes: Arrays) -> None:
        self.module, self.name, self.notes = module, name, notes

    def __call__(self, *inputs: object) -> mx.array:
        output = self.module(*inputs)
        self.notes[self.name] = numpy(output)
        return output


def numpy(array: mx.array) -> np.ndarray:
    """NumPy has no bfloat16, and float32 holds all its numbers."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def slowly(write: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        time.sleep(SLOW)
        write(*arguments)

    return call


def quantize_linears(model: CausalLM) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantize_modules(model, dict.fromkeys(linears, Quantization(group_size=32, bits=4)))
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear):
            module.freeze()  # a bias that MLX has put in after freezing the rest


class MlxTrainer:
    """The trainer that ships: `LoRATrainer` with the fast path."""

    dialect = Dialect()
    share_expected = 0.25  # the share of a tolerance above which the summary warns
    dtype = mx.float32
    base_dtype: mx.Dtype | None = None  # of the frozen weights, where it is another
    is_in_4_bits = False
    ops: ModuleType = mlx_impl.fast.ops
    plain = False

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        self.model = CausalLM(spec)
        self.model.load_weights([(name, self.base_array(value)) for name, value in weights.items()])
        if lora is not None:
            add_lora(self.model, lora)
            given = [(name, self.array(value)) for name, value in (factors or {}).items()]
            self.model.load_weights(given, strict=False)
        self.quantize = quantize_linears if self.is_in_4_bits else lambda model: None
        self.quantize(self.model)
        self.trainer: LoRATrainer | None = None
        self.examples = DATA
        self.masks: Arrays | None = None
        self.records: list[StepRecord] = []
        self.merged: Merged | None = None
        self.saved: Path | None = None  # a run to resume
        self.ranks: Ranks | None = None  # where this process is one of several
        self.first_update = 0  # how many updates a new run pretends to have done
        self.base_type = self.base_dtype or self.dtype  # of the logits too
        self.goes_on = False  # whether the next call continues the present run

    @classmethod
    @contextmanager
    def exact(cls) -> Iterator[None]:
        """Trainers built inside compute in float64 throughout, on the CPU, because a GPU has no float64."""
        device = mx.default_device()
        mx.set_default_device(mx.cpu)
        cls.dtype = mx.float64
        try:
            with in_place_of_production():
                yield
        finally:
            cls.dtype = mx.float32
            mx.set_default_device(device)

    @classmethod
    @contextmanager
    def in_bfloat16(cls) -> Iterator[None]:
        cls.base_dtype = mx.bfloat16
        try:
            yield
        finally:
            cls.base_dtype = None

    @classmethod
    @contextmanager
    def in_4_bits(cls) -> Iterator[None]:
        cls.is_in_4_bits = True
        try:
            yield
        finally:
            cls.is_in_4_bits = False

    @property
    def path(self) -> Loss:
        """The loss that `LoRATrainer` uses, with the given dropout masks if there are any."""
        loss: Loss = getattr(run_trainer, "PLAIN" if self.plain else "FAST")
        return loss if self.masks is None else with_given_masks(self.model, self.masks, loss)

    def array(self, value: np.ndarray) -> mx.array:
        return mx.array(value, self.dtype)

    def base_array(self, value: np.ndarray) -> mx.array:
        return mx.array(value, self.base_dtype or self.dtype)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.model.eval()
        return numpy(self.model(mx.array(tokens_BT)))

    def hidden_states(self, tokens_BT: np.ndarray) -> Arrays:
        decoder: Any = self.model.model
        notes: Arrays = {}
        layers, embedding, norm = decoder.layers, decoder.embed_tokens, decoder.norm
        self.model.eval()
        decoder.embed_tokens = Tap(embedding, "model.embed_tokens", notes)
        decoder.layers = [Tap(layer, f"model.layers.{n}", notes) for n, layer in enumerate(layers)]
        decoder.norm = Tap(norm, "model.norm", notes)
        decoder(mx.array(tokens_BT))
        decoder.layers, decoder.embed_tokens, decoder.norm = layers, embedding, norm
        return notes

    def loss(self, batch: Batch) -> tuple[float, int]:
        self.model.eval()
        nats, num_targets = self.path.batch_loss(self.model, self.path.to_arrays(batch))
        return nats.item(), num_targets.item()

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        logits_NV, V = self.base_array(logits_BTV).flatten(0, 1), logits_BTV.shape[-1]
        targets_N, mask_N = mx.array(batch.targets_BT.flatten()), mx.array(batch.mask_BT.flatten())
        nats, num_targets = head_nats(lambda logits: logits, V, logits_NV, targets_N, mask_N)
        return nats.item(), num_targets.item()

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return self.begin(TrainConfig(iters=1)).evaluate_batches(batches)

    def gradients(self, batch: Batch) -> Arrays:
        """The gradients in the form that the optimizer gets them, converted back to named factors."""
        self.model.eval()
        loss_and_grads = nn.value_and_grad(self.model, self.path.batch_loss)
        (_, num_targets), grads = loss_and_grads(self.model, self.path.to_arrays(batch))
        flat = self.path.flatten_grads(grads)
        tree = flat if self.plain else as_factors(flat, self.model.trainable_parameters())
        return {name: numpy(value / num_targets) for name, value in tree_flatten(tree)}

    def pullback(self, batch: Batch, cotangent_BTV: np.ndarray) -> Arrays:
        def along(model: CausalLM) -> mx.array:
            return (model(mx.array(batch.inputs_BT)) * self.array(cotangent_BTV)).sum()

        self.model.eval()
        _, gradients = nn.value_and_grad(self.model, along)(self.model)
        return {name: np.array(value) for name, value in tree_flatten(gradients)}

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.run(windows, training, compiled=False)

    def train_compiled(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.run(windows, training, compiled=True)

    def train_checkpointed(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.run(windows, replace(training, grad_checkpoint=True), compiled=False)

    def train_on_ranks(
        self, windows: Sequence[Sequence[Batch]], training: TrainConfig, num_ranks: int
    ) -> list[tuple[list[float], Arrays]]:
        return self.on_ranks(num_ranks, "train_here", windows, training)

    def initial_factors_on_ranks(self, seed: int, num_ranks: int) -> list[Arrays]:
        return self.on_ranks(num_ranks, "initial_factors", seed)

    def save_on_ranks(
        self, windows: Sequence[Sequence[Batch]], training: TrainConfig, folders: Sequence[Path]
    ) -> list[list[str]]:
        return self.on_ranks(len(folders), "save_here", windows, training, folders)

    def on_ranks(self, num_ranks: int, method: str, *arguments: object) -> list[Any]:
        """What it returns on each rank: a process of its own (one_rank.py), in a ring on this machine."""
        job = {
            "trainer": type(self).__name__,
            "model": (self.model.config, self.base(), self.model.lora, self.factors()),
            "method": method,
            "arguments": arguments,
            "device": "gpu" if mx.default_device() == mx.gpu else "cpu",
        }
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "job").write_bytes(pickle.dumps(job))
            for code, _, error in outputs(start(folder, num_ranks, "tests.trainers.one_rank", name)):
                if code:
                    raise RuntimeError(error)
            return [pickle.loads((folder / f"rank {rank}").read_bytes()) for rank in range(num_ranks)]

    def train_here(
        self, windows: Sequence[Sequence[Batch]], training: TrainConfig
    ) -> tuple[list[float], Arrays]:
        """`train_on_ranks` in one of the processes."""
        return self.train(windows, training), self.factors()

    def save_here(
        self, windows: Sequence[Sequence[Batch]], training: TrainConfig, folders: Sequence[Path]
    ) -> list[str]:
        """`save_on_ranks` in one of the processes. Writing takes long, so that the others must wait."""
        assert self.ranks is not None
        self.train(windows, training)
        with patch.object(run_trainer, "save_state", slowly(save_state)):
            self.save(folders[self.ranks.rank])
        return sorted(path.name for path in folders[0].iterdir())

    def each_update(self, windows: Iterator[Sequence[Batch]], training: TrainConfig) -> Iterator[float]:
        for record in self.begin(training).fit_windows(map(list, windows)):
            yield record.loss_nats

    def peak_bytes(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> int:
        """At a memory limit of 0 MLX waits for what it has queued, so the peak is that of the graph."""
        mx.eval(self.model.parameters())
        mx.synchronize()
        limit = mx.set_memory_limit(0)
        try:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            self.train(windows, training)
            mx.synchronize()
            return mx.get_peak_memory() - before
        finally:
            mx.set_memory_limit(limit)

    def run(self, windows: Sequence[Sequence[Batch]], training: TrainConfig, compiled: bool) -> list[float]:
        trainer = self.begin(training, compiled)
        self.records = list(trainer.fit_windows([list(window) for window in windows]))
        return [record.loss_nats for record in self.records]

    def micro_batches(self, examples: Examples, training: TrainConfig) -> list[list[Batch]]:
        """What `LoRATrainer.fit` hands to `fit_windows`, which `train` runs on the ladder's own batches."""
        self.examples = [Example(*example) for example in examples]
        windows: list[list[Batch]] = []

        def noting(given: Iterable[list[Batch]]) -> Iterator[StepRecord]:
            windows.extend(given)
            return iter(())

        trainer = self.begin(training, compiled=None)
        with patch.object(trainer, "fit_windows", noting):
            list(trainer.fit(self.examples))
        return windows

    def read_examples(self, folder: Path, file: Path, targets: str, max_tokens: int) -> Any:
        examples = encode_all(load_tokenizer(folder), read_conversations(file), targets, max_tokens)
        return [(example.tokens, example.is_target) for example in examples]

    def fit(
        self,
        examples: Examples,
        training: TrainConfig,
        num_updates: int,
        validation: Examples = (),
        folder: Path | None = None,
    ) -> tuple[list[float], list[float]]:
        """As the command `train` does it: update, validate, save."""
        self.examples = [Example(*example) for example in examples]
        same = validation is examples  # a program has one list of them then
        held_out = self.examples if same else [Example(*example) for example in validation]
        trainer, losses = self.begin(training, compiled=None), []
        validations = [trainer.validate(held_out)] if held_out else []
        for record in islice(trainer.fit(self.examples), num_updates):
            losses.append(record.loss_nats)
            if held_out:
                validations.append(trainer.validate(held_out))
            if folder:
                self.save(folder)
        return losses, validations

    def begin(self, training: TrainConfig, compiled: bool | None = False) -> LoRATrainer:
        """A trainer for a new run, or for the loaded one; that of the present run where this goes on."""
        if self.goes_on and self.trainer is not None:
            return self.trainer
        self.trainer = LoRATrainer(self.model, self.model.lora, training, compiled, self.plain, self.ranks)
        if self.masks is not None:
            self.trainer.loss = self.path
        if self.saved is not None:
            self.trainer.resume(self.saved, self.examples)
        elif self.first_update:
            for one in self.trainer.optimizer.optimizers:
                one.state["step"] = mx.array(self.first_update, one.state["step"].dtype)
            self.trainer.guard = FiniteGuard(self.model, self.trainer.optimizer, self.first_update)
        return self.trainer

    def start_at(self, update: int) -> None:
        self.first_update = update

    def optimizer_names(self, training: TrainConfig) -> set[str]:
        """Every parameter whose moments the optimizer holds.

        A vector holds all parameters of a kind (lora_a, say), so it stands for every parameter of that kind.
        """
        optimizer = self.begin(training).optimizer
        moments = {
            name.rpartition(".")[0] for one in optimizer.optimizers for name, _ in tree_flatten(one.state)
        }
        if not isinstance(optimizer, VectorOptimizer):
            return moments - {""}
        parameters = [name for name, _ in tree_flatten(self.model.parameters())]
        return {name for name in parameters if name.rpartition(".")[2] in moments}

    def apply_gradients(self, gradients: Sequence[Arrays], training: TrainConfig) -> None:
        optimizer = self.begin(training).optimizer
        for update, given in enumerate(gradients, self.first_update):
            optimizer.set_learning_rate(learning_rate_of(update, training))
            tree = tree_unflatten([(name, self.array(value)) for name, value in given.items()])
            sums = ((mx.array(0.0), mx.array(1)), self.path.flatten_grads(tree))
            apply_mean(self.model, optimizer, 0.0, sums)
            mx.eval(self.model, optimizer.state)

    def learning_rates(self, training: TrainConfig) -> list[float]:
        return [learning_rate_of(update, training) for update in range(training.iters)]

    def token_counts(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[int]:
        self.train(windows, training)
        return [record.num_tokens for record in self.records]

    def gradient_norms(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        self.train(windows, training)
        return [record.grad_norm for record in self.records]

    def set_dropout_masks(self, masks: Arrays) -> None:
        self.masks = masks

    def initial_factors(self, seed: int) -> Arrays:
        """Of a run that begins anew: `LoRATrainer` puts the adapter into a model that has none."""
        fresh = CausalLM(self.model.config)
        self.quantize(fresh)
        stored = [(name.replace(".linear.", "."), x) for name, x in tree_flatten(self.model.parameters())]
        fresh.load_weights([(name, x) for name, x in stored if not name.endswith(NOT_OF_THE_BASE)])
        training = TrainConfig(iters=1, seed=seed)
        LoRATrainer(fresh, self.model.lora, training, plain=self.plain, ranks=self.ranks)
        return {name: np.array(value) for name, value in lora_parameters(fresh).items()}

    def factors(self) -> Arrays:
        return {name: np.array(value) for name, value in lora_parameters(self.model).items()}

    def base(self) -> Arrays:
        others = (*NOT_OF_THE_BASE, ".scales", ".biases")
        arrays = dict(tree_flatten(self.model.parameters()))
        arrays |= {
            f"{name}.weight": dense_weight_OI(module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.QuantizedLinear)
        }
        return {
            name.replace(".linear.", "."): numpy(value)
            for name, value in arrays.items()
            if not name.endswith(others)
        }

    def save(self, folder: Path) -> None:
        assert self.trainer is not None, "nothing was trained"
        self.trainer.save(folder / "state.safetensors", self.examples)

    def load(self, folder: Path) -> None:
        self.saved = folder / "state.safetensors"

    def validation_losses(self) -> dict[int, float]:
        assert self.trainer is not None, "nothing was trained"
        return dict(self.trainer.validation)

    def set_factors(self, factors: Arrays) -> None:
        """As a program does it between two calls of `fit`; optimizer and guard are not told."""
        given = [(name, self.array(value)) for name, value in factors.items()]
        self.model.update(tree_unflatten(given))
        self.goes_on = True

    def require_same_run(self, folder: Path, examples: Examples, training: TrainConfig) -> None:
        again = LoRATrainer(self.model, self.model.lora, training, plain=self.plain)
        again.resume(folder / "state.safetensors", [Example(*example) for example in examples])

    def dropout_is_on(self) -> bool:
        return any(layer.dropout.training for layer in lora_layers(self.model).values())

    def merge(self) -> None:
        self.merged = merge(self.model)

    def unmerge(self) -> None:
        assert self.merged is not None
        unmerge(self.model, self.merged)

    def save_adapter(self, folder: Path) -> None:
        save_adapter(self.model, self.model.lora, folder, "the ladder's model")

    def load_adapter(self, folder: Path) -> None:
        load_adapter(self.model, folder)

    def save_mlx_lm(self, folder: Path) -> None:
        save_adapter(self.model, self.model.lora, folder, "the ladder's model", "mlx-lm")

    def load_mlx_lm(self, folder: Path) -> None:
        load_adapter(self.model, folder)

    def sample(self, logits_V: np.ndarray, temperature: float, top_p: float, number: int) -> list[int]:
        choose = Sampling(temperature, top_p)
        return choose(mx.broadcast_to(mx.array(logits_V, self.base_type), (number, len(logits_V)))).tolist()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return list(generate(self.model, prompt, num_tokens, stop_ids=()))

    def greedy_all(self, prompts: list[list[int]], num_tokens: int, end: int) -> list[list[int]]:
        return generate_all(self.model, prompts, num_tokens, stop_ids={end})


class PlainTrainer(MlxTrainer):
    """The plain pattern, without `mlx_impl/fast`: `LoRATrainer(..., plain=True)`."""

    ops = mlx_impl.ops
    plain = True

    def peak_bytes(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> int:
        if training.grad_checkpoint:
            raise NotImplementedError(
                "mx.checkpoint recomputes many blocks at once: fast/recompute.py says why"
            )
        return super().peak_bytes(windows, training)

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        targets_BT, mask_BT = mx.array(batch.targets_BT), mx.array(batch.mask_BT)
        nats, num_targets = next_token_nats(self.base_array(logits_BTV), targets_BT, mask_BT)
        return nats.item(), num_targets.item()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return list(plain_generate(self.model, prompt, num_tokens, stop_ids=()))

    def greedy_all(self, prompts: list[list[int]], num_tokens: int, end: int) -> list[list[int]]:
        return [list(plain_generate(self.model, prompt, num_tokens, {end})) for prompt in prompts]
