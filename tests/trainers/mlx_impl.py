"""`mlx_impl` behind the ladder's face, with every capability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl import ops
from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from mlx_impl.generate import generate, generate_all
from mlx_impl.lora import Dropout, add_lora, lora_layers, lora_parameters
from mlx_impl.loss import next_token_nats
from mlx_impl.model import CausalLM
from mlx_impl.optim import LoRAOptimizer, learning_rate_of
from mlx_impl.run.guard import FiniteGuard
from mlx_impl.run.merging import Merged, merge, unmerge
from mlx_impl.run.state import Progress, load_state, restore, save_state, snapshot
from mlx_impl.train import StepRecord, apply_mean, batch_loss, evaluate, to_arrays, train
from tests.ladder.protocol import Arrays, Dialect
from tests.trainers.every_slot import every_slot
from tests.trainers.exact_ops import in_place_of_production


class FixedDropout(Dropout):
    """Dropout with a given mask."""

    def __init__(self, p: float, keep_BTI: np.ndarray) -> None:
        super().__init__(p)
        self.keep_BTI = mx.array(keep_BTI)
        self.freeze()

    def __call__(self, x_BTI: mx.array) -> mx.array:
        return x_BTI * self.keep_BTI / (1 - self.p) if self.training else x_BTI


class Tap:
    """A module that notes what it gives."""

    def __init__(self, module: Callable, name: str, notes: Arrays) -> None:
        self.module, self.name, self.notes = module, name, notes

    def __call__(self, *inputs: object) -> mx.array:
        output = self.module(*inputs)
        self.notes[self.name] = np.array(output)
        return output


class MlxTrainer:
    dialect = Dialect()
    share_expected = 0.25  # of a tolerance; more is a warning
    ops = ops
    dtype = mx.float32

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        self.model = CausalLM(spec)
        self.model.load_weights([(name, self.array(value)) for name, value in weights.items()])
        if lora is not None:
            add_lora(self.model, lora)
            given = [(name, self.array(value)) for name, value in (factors or {}).items()]
            self.model.load_weights(given, strict=False)
        self.records: list[StepRecord] = []
        self.merged: Merged | None = None
        self.saved: Path | None = None  # a run to go on with

    @classmethod
    @contextmanager
    def exact(cls) -> Iterator[None]:
        """Trainers that compute in float64 throughout, on the CPU: a GPU has none."""
        device = mx.default_device()
        mx.set_default_device(mx.cpu)
        cls.dtype = mx.float64
        try:
            with in_place_of_production():
                yield
        finally:
            cls.dtype = mx.float32
            mx.set_default_device(device)

    def array(self, value: np.ndarray) -> mx.array:
        return mx.array(value, self.dtype)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.model.eval()
        return np.array(self.model(mx.array(tokens_BT)))

    def hidden_states(self, tokens_BT: np.ndarray) -> Arrays:
        decoder, notes = self.model.model, {}  # type: CausalLM, Arrays
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
        nats, num_targets = batch_loss(self.model, to_arrays(batch))
        return nats.item(), num_targets.item()

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        targets_N, mask_N = mx.array(batch.targets_BT.reshape(-1)), mx.array(batch.mask_BT.reshape(-1))
        nats, num_targets = next_token_nats(self.array(logits_BTV).flatten(0, 1), targets_N, mask_N)
        return nats.item(), num_targets.item()

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return evaluate(self.model, batches)[0]

    def gradients(self, batch: Batch) -> Arrays:
        self.model.eval()
        (_, num_targets), gradients = nn.value_and_grad(self.model, batch_loss)(self.model, to_arrays(batch))
        return {name: np.array(value / num_targets) for name, value in tree_flatten(gradients)}

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
        return self.run(windows, TrainConfig(**{**vars(training), "grad_checkpoint": True}), compiled=False)

    def run(self, windows: Sequence[Sequence[Batch]], training: TrainConfig, compiled: bool) -> list[float]:
        updates_done = self.begin(training)
        guard = FiniteGuard(self.model, self.optimizer, updates_done)
        lists = [list(window) for window in windows]
        self.records = list(train(self.model, self.optimizer, lists, training, compiled, guard))
        return [record.loss_nats for record in self.records]

    def begin(self, training: TrainConfig) -> int:
        """An optimizer for a new run, or for the one that was loaded; the updates done."""
        self.optimizer = LoRAOptimizer(training)
        self.optimizer.init(self.model.trainable_parameters())
        if self.saved is None:
            return 0
        arrays, progress = load_state(self.saved, {}, snapshot(self.optimizer))
        restore(self.model, self.optimizer, arrays)
        return progress.step

    def optimizer_names(self, training: TrainConfig) -> set[str]:
        """Every parameter of a kind whose moments, one vector for all of a kind, the optimizer holds."""
        self.begin(training)
        states = [tree_flatten(optimizer.state) for optimizer in self.optimizer.optimizers]
        kinds = {name.rpartition(".")[0] for state in states for name, _ in state} - {""}
        parameters = [name for name, _ in tree_flatten(self.model.parameters())]
        return {name for name in parameters if name.rpartition(".")[2] in kinds}

    def apply_gradients(self, gradients: Sequence[Arrays], training: TrainConfig) -> None:
        self.begin(training)
        for step, given in enumerate(gradients):
            self.optimizer.set_learning_rate(learning_rate_of(step, training))
            tree = tree_unflatten([(name, self.array(value)) for name, value in given.items()])
            sums = ((mx.array(0.0), mx.array(1)), tree)
            apply_mean(self.model, self.optimizer, 0.0, sums)
            mx.eval(self.model, self.optimizer.state)

    def learning_rates(self, training: TrainConfig) -> list[float]:
        return [learning_rate_of(step, training) for step in range(training.iters)]

    def gradient_norms(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        self.train(windows, training)
        return [record.grad_norm for record in self.records]

    def set_dropout_masks(self, masks: Arrays) -> None:
        decoder = self.model.model  # the masks are of all slots
        decoder.at_targets = partial(every_slot, decoder)  # type: ignore[method-assign]
        for name, layer in lora_layers(self.model).items():
            layer.dropout = FixedDropout(layer.dropout.p, masks[name])

    def factors(self) -> Arrays:
        return {name: np.array(value) for name, value in lora_parameters(self.model).items()}

    def base(self) -> Arrays:
        factors = ("lora_a", "lora_b", "magnitude", "keep_BTI")
        return {
            name.replace(".linear.", "."): np.array(value)
            for name, value in tree_flatten(self.model.parameters())
            if not name.endswith(factors)
        }

    def save(self, folder: Path) -> None:
        arrays = snapshot(self.optimizer)
        save_state(folder / "state.safetensors", arrays, Progress(self.records[-1].step, [], {}))

    def load(self, folder: Path) -> None:
        self.saved = folder / "state.safetensors"

    def merge(self) -> None:
        self.merged = merge(self.model)

    def unmerge(self) -> None:
        assert self.merged is not None
        unmerge(self.model, self.merged)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return list(generate(self.model, prompt, num_tokens, stop_ids=()))

    def greedy_all(self, prompts: list[list[int]], num_tokens: int, end: int) -> list[list[int]]:
        return generate_all(self.model, prompts, num_tokens, stop_ids={end})
