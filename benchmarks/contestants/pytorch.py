"""`reference/`, the plain PyTorch model that mlx_impl is tested against, on a CPU."""

from __future__ import annotations

from itertools import cycle

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from reference.lora import add_lora
from reference.model import CausalLM, load_arrays
from reference.optim import make_optimizer
from reference.train import add_up, apply_mean
from tests.peers.cases import to_tensors


class Reference:
    def __init__(self, inputs: Inputs, case: Case) -> None:
        self.model = CausalLM(inputs.config)
        load_arrays(self.model, inputs.weights)
        self.model.to(getattr(torch, case.dtype))
        add_lora(self.model, case.lora)
        self.optimizer = make_optimizer(self.model, case.training)
        self.windows = cycle([[to_tensors(batch) for batch in window] for window in inputs.windows])
        self.model.train()

    def step(self) -> float:
        nats, num_targets = add_up(self.model, next(self.windows))
        apply_mean(self.optimizer, 0.0, num_targets)
        return nats / num_targets


build = Reference
