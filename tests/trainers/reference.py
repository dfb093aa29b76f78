"""An adapter for the PyTorch reference, in float32 or float64, in any dialect a trainer may declare."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from reference.data import Batch as TorchBatch
from reference.data import make_batch, training_windows
from reference.generate import generate
from reference.lora import LoRALinear, add_lora, merge
from reference.loss import next_token_nats
from reference.model import CausalLM, load_arrays
from reference.optim import make_optimizer, share_of_peak
from reference.targets import of_pattern
from reference.train import add_up, apply_mean, batch_loss, evaluate
from tests.lora_ladder import mlx_lm_files
from tests.lora_ladder.peft_files import (
    TENSORS,
    config_of,
    linears_of,
    of_file,
    read_record,
    read_safetensors,
    record_of,
    write_adapter,
)
from tests.lora_ladder.protocol import Arrays, Dialect, Examples

LONG_AGO = 1e9  # after so many updates Adam's bias correction is 1


class FixedDropout(nn.Module):
    """Dropout with a given mask: x * keep / (1 - p) while training."""

    def __init__(self, keep_BTI: np.ndarray, p: float) -> None:
        super().__init__()
        self.keep_BTI, self.p = torch.tensor(keep_BTI), p

    def forward(self, x_BTI: Tensor) -> Tensor:
        return x_BTI * self.keep_BTI / (1 - self.p) if self.training else x_BTI


class Run:
    """The state of a run from update to update: the optimizer and its schedule."""

    def __init__(
        self, model: CausalLM, training: TrainConfig, dialect: Dialect, first_update: int = 0
    ) -> None:
        self.optimizer = make_optimizer(model, training)
        self.schedule = LambdaLR(self.optimizer, lambda step: share_of_peak(step, training))
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.max_grad_norm, self.accumulation = training.max_grad_norm, dialect.accumulation
        done = float(first_update) if dialect.bias_correction else LONG_AGO
        if training.optimizer == "adamw" and done:
            for p in self.trained:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(done), **zeros}
        if first_update:
            self.schedule.last_epoch = first_update
            for group, peak in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
                group["lr"] = peak * share_of_peak(first_update, training)

    def update(self, model: CausalLM, window: list[TorchBatch]) -> tuple[float, float]:
        """One optimizer update. Returns the mean nats per target, and the gradient norm before clipping."""
        if self.accumulation == "by targets":
            nats, num_targets = add_up(model, window)
            result = nats / num_targets, apply_mean(self.optimizer, self.max_grad_norm, num_targets)
        else:
            result = self.update_by_means(model, window)
        self.schedule.step()
        return result

    def update_by_means(self, model: CausalLM, window: list[TorchBatch]) -> tuple[float, float]:
        """An update by the mean of the micro-batches' means, which ignores how many targets each has."""
        self.optimizer.zero_grad()
        total_nats, total_targets = 0.0, 0
        for batch in window:
            nats, num_targets = batch_loss(model, batch)
            (nats / num_targets / len(window)).backward()
            total_nats, total_targets = total_nats + nats.item(), total_targets + int(num_targets)
        norm = clip_grad_norm_(self.trained, self.max_grad_norm or torch.inf)
        self.optimizer.step()
        return total_nats / total_targets, norm.item()


class ReferenceTrainer:
    dialect: ClassVar[Dialect] = Dialect()
    dtype: ClassVar[torch.dtype] = torch.float64

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        self.spec, self.lora = spec, lora
        self.model = CausalLM(spec).to(self.dtype)
        load_arrays(self.model, weights)
        if lora is not None:
            add_lora(self.model, lora)
            load_arrays(self.model, {**self.numpy(), **(factors or {})})
            if self.dialect.scale == "alpha":
                for name, linear in self.adapted().items():
                    linear.scale = of_pattern(name, lora.alpha_pattern, lora.alpha)
        self.run: Run | None = None
        self.saved: dict | None = None
        self.first_update = 0

    def numpy(self) -> Arrays:
        return {name: value.numpy().copy() for name, value in self.model.state_dict().items()}

    def adapted(self) -> dict[str, LoRALinear]:
        return {n: module for n, module in self.model.named_modules() if isinstance(module, LoRALinear)}

    def tensors(self, batch: Batch) -> TorchBatch:
        return TorchBatch(
            torch.tensor(batch.inputs_BT, dtype=torch.long),
            torch.tensor(batch.targets_BT, dtype=torch.long),
            torch.tensor(with_pad_targets(batch.mask_BT, self.dialect.pad_targets)),
            None if batch.segment_BT is None else torch.tensor(batch.segment_BT, dtype=torch.long),
        )

    # The required members.

    @torch.no_grad()
    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self.model.eval()(torch.tensor(tokens_BT, dtype=torch.long)).numpy()

    @torch.no_grad()
    def loss(self, batch: Batch) -> tuple[float, int]:
        nats, num_targets = batch_loss(self.model.eval(), self.tensors(batch))
        return nats.item(), int(num_targets)

    def gradients(self, batch: Batch) -> Arrays:
        nats, num_targets = batch_loss(self.model.eval(), self.tensors(batch))
        return self.gradients_of(nats / num_targets)

    def gradients_of(self, scalar: Tensor) -> Arrays:
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(scalar, list(trained.values()))
        return {name: gradient.numpy() for name, gradient in zip(trained, gradients, strict=True)}

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return [loss_nats for loss_nats, _ in self.updates(windows, training)]

    def updates(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[tuple[float, float]]:
        """The loss and the gradient norm of every update."""
        run = self.begin(training)
        return [run.update(self.model, list(map(self.tensors, window))) for window in windows]

    def each_update(self, windows: Iterator[Sequence[Batch]], training: TrainConfig) -> Iterator[float]:
        run = self.begin(training)
        for window in windows:
            yield run.update(self.model, list(map(self.tensors, window)))[0]

    def begin(self, training: TrainConfig) -> Run:
        """A new run, or the loaded one."""
        self.run = Run(self.model, training, self.dialect, self.first_update)
        torch.manual_seed(training.seed)
        if self.saved:
            self.run.optimizer.load_state_dict(self.saved["optimizer"])
            self.run.schedule.load_state_dict(self.saved["schedule"])
            torch.set_rng_state(self.saved["random"])
        self.model.train()
        return self.run

    def factors(self) -> Arrays:
        return {n: p.detach().numpy().copy() for n, p in self.model.named_parameters() if p.requires_grad}

    def base(self) -> Arrays:
        trained = self.factors()
        return {n.replace(".linear.", "."): v for n, v in self.numpy().items() if n not in trained}

    # The capabilities.

    @torch.no_grad()
    def hidden_states(self, tokens_BT: np.ndarray) -> Arrays:
        states: Arrays = {}
        decoder = self.model.eval().model
        named: dict[str, nn.Module] = {"model.embed_tokens": decoder.embed_tokens}
        named |= {f"model.layers.{number}": block for number, block in enumerate(decoder.layers)}
        for name, module in {**named, "model.norm": decoder.norm}.items():

            def keep(_module: object, _inputs: object, output: Tensor, name: str = name) -> None:
                states[name] = output.numpy()

            module.register_forward_hook(keep)
        self.logits(tokens_BT)
        return states

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        _, targets_BT, mask_BT, _ = self.tensors(batch)
        logits = torch.tensor(logits_BTV, dtype=self.dtype)
        nats, num_targets = next_token_nats(logits, targets_BT, mask_BT)
        return nats.item(), int(num_targets)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return evaluate(self.model, [self.tensors(batch) for batch in batches])

    def micro_batches(self, examples: Examples, training: TrainConfig) -> list[list[Batch]]:
        return [list(map(as_numpy, window)) for window in training_windows(examples, training)]

    def fit(
        self,
        examples: Examples,
        training: TrainConfig,
        num_updates: int,
        validation: Examples = (),
        folder: Path | None = None,
    ) -> tuple[list[float], list[float]]:
        run, losses = self.begin(training), []
        held_out = [as_numpy(make_batch(validation, [(n,)])) for n in range(len(validation))]
        validations = [self.evaluate(held_out)] if held_out else []
        done = run.schedule.last_epoch
        for window in self.micro_batches(examples, training)[done : done + num_updates]:
            losses.append(run.update(self.model, list(map(self.tensors, window)))[0])
            if held_out:
                validations.append(self.evaluate(held_out))
            if folder:
                self.save(folder)
        return losses, validations

    def pullback(self, batch: Batch, cotangent_BTV: np.ndarray) -> Arrays:
        logits_BTV = self.model.eval()(self.tensors(batch)[0])
        return self.gradients_of((logits_BTV * torch.tensor(cotangent_BTV, dtype=self.dtype)).sum())

    def optimizer_names(self, training: TrainConfig) -> set[str]:
        held = {id(p) for p in Run(self.model, training, self.dialect).trained}
        return {name for name, p in self.model.named_parameters() if id(p) in held}

    def apply_gradients(self, gradients: Sequence[Arrays], training: TrainConfig) -> None:
        run = Run(self.model, training, self.dialect, self.first_update)
        parameters = dict(self.model.named_parameters())
        for update in gradients:
            for name, gradient in update.items():
                parameters[name].grad = torch.tensor(gradient, dtype=self.dtype)
            run.optimizer.step()
            run.schedule.step()

    def learning_rates(self, training: TrainConfig) -> list[float]:
        run, rates = Run(self.model, training, self.dialect), []
        for _ in range(training.iters):
            rates.append(run.optimizer.param_groups[0]["lr"])
            run.optimizer.step()  # without gradients it changes nothing
            run.schedule.step()
        return rates

    def start_at(self, update: int) -> None:
        self.first_update = update

    def gradient_norms(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return [norm for _, norm in self.updates(windows, training)]

    def set_dropout_masks(self, keep: Arrays) -> None:
        for name, linear in self.adapted().items():
            linear.dropout = FixedDropout(keep[name], linear.dropout.p)  # type: ignore[assignment]

    def initial_factors(self, seed: int) -> Arrays:
        assert self.lora is not None, "there is no adapter"
        torch.manual_seed(seed)
        fresh = CausalLM(self.spec).to(self.dtype)
        load_arrays(fresh, self.base())
        add_lora(fresh, self.lora)
        return {n: p.detach().numpy().copy() for n, p in fresh.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        torch.save(self.state(), folder / "state.pt")

    def state(self) -> dict:
        assert self.run is not None, "nothing was trained"
        return {
            "factors": {n: torch.tensor(v) for n, v in self.factors().items()},
            "optimizer": self.run.optimizer.state_dict(),
            "schedule": self.run.schedule.state_dict(),
            "random": torch.get_rng_state(),
        }

    def set_factors(self, factors: Arrays) -> None:
        self.saved = self.state()
        load_arrays(self.model, {**self.numpy(), **factors})

    def load(self, folder: Path) -> None:
        self.saved = torch.load(folder / "state.pt", weights_only=True)
        factors = {name: value.numpy() for name, value in self.saved["factors"].items()}
        load_arrays(self.model, {**self.numpy(), **factors})

    def merge(self) -> None:
        merge(self.model)

    def save_adapter(self, folder: Path) -> None:
        assert self.lora is not None, "there is no adapter"
        factors = {name: value.astype(np.float32) for name, value in self.factors().items()}
        write_adapter(folder, record_of(self.lora, self.adapted()), factors)

    def load_adapter(self, folder: Path) -> None:
        self.lora = config_of(read_record(folder), self.spec.num_hidden_layers)
        add_lora(self.model, self.lora)
        factors = of_file(read_safetensors(folder / TENSORS)[0])
        if factors.keys() != self.factors().keys():
            raise ValueError("the file must have the adapter's factors")
        load_arrays(self.model, {**self.numpy(), **factors})

    def save_mlx_lm(self, folder: Path) -> None:
        assert self.lora is not None, "there is no adapter"
        kinds = {(linear.lora_a.shape[1], linear.scale) for linear in self.adapted().values()}
        if len(kinds) > 1:
            raise NotImplementedError("mlx-lm has one rank and one scale")
        ((rank, scale),) = kinds
        keys, is_dora = sorted(self.adapted()), self.lora.use_dora
        record = mlx_lm_files.record_of(rank, scale, self.lora.dropout, -1, keys, is_dora)
        factors = {name: value.astype(np.float32) for name, value in self.factors().items()}
        mlx_lm_files.write_adapter(folder, record, factors)

    def load_mlx_lm(self, folder: Path) -> None:
        record, factors = mlx_lm_files.read_adapter(folder)
        linears = [name for name in linears_of(self.numpy()) if name.startswith("model.")]
        self.lora = mlx_lm_files.config_of(record, linears, self.spec.num_hidden_layers)
        add_lora(self.model, self.lora)
        load_arrays(self.model, {**self.numpy(), **factors})

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return list(generate(self.model, prompt, num_tokens, stop_ids=()))

    def greedy_all(self, prompts: Sequence[list[int]], num_tokens: int, end: int) -> list[list[int]]:
        return [list(generate(self.model, prompt, num_tokens, stop_ids={end})) for prompt in prompts]


class Float32Reference(ReferenceTrainer):
    """Another right float32 program, which the tolerances must let pass."""

    dtype = torch.float32


@functools.cache
def oracle(dialect: Dialect, dtype: torch.dtype) -> type[ReferenceTrainer]:
    """The reference in the dialect that a trainer declares."""
    return type("Oracle", (ReferenceTrainer,), {"dialect": dialect, "dtype": dtype})


def as_numpy(batch: TorchBatch) -> Batch:
    assert batch.segment_BT is not None, "every batch of the reference has segments"
    inputs_BT, targets_BT, mask_BT = (tensor.numpy() for tensor in batch[:3] if tensor is not None)
    segment_BT = batch.segment_BT.numpy()
    return Batch(inputs_BT, targets_BT, mask_BT, int((segment_BT >= 0).sum()), segment_BT=segment_BT)


def with_pad_targets(mask_BT: np.ndarray, pad_targets: int) -> np.ndarray:
    """The mask plus, in each row, `pad_targets` positions after its last target, if the row is that long."""
    mask_BT = mask_BT.copy()
    for mask_T in mask_BT:
        if mask_T.any():
            end = int(np.flatnonzero(mask_T)[-1]) + 1
            mask_T[end : end + pad_targets] = True
    return mask_BT
