"""mlx_impl as users run it: LoRATrainer's model and optimizer, and the loop of train.py."""

from __future__ import annotations

from itertools import cycle

import mlx.core as mx
import mlx.nn as nn

from benchmarks.cases import GROUP_SIZE, Case
from benchmarks.inputs import Inputs
from mlx_impl.model import CausalLM
from mlx_impl.run.ranks import Ranks
from mlx_impl.run.trainer import LoRATrainer


class Ours:
    def __init__(
        self,
        inputs: Inputs,
        case: Case,
        compiled: bool | None = None,
        bits: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model = CausalLM(inputs.config)
        model.load_weights([(name, mx.array(array)) for name, array in inputs.weights.items()])
        model.set_dtype(getattr(mx, case.dtype))
        if bits or case.bits:
            nn.quantize(model, GROUP_SIZE, bits or case.bits)
        mx.eval(model.parameters())
        trainer = LoRATrainer(model, case.lora, case.training, compiled, ranks=ranks)
        self.records = trainer.fit_windows(cycle(inputs.windows))

    def step(self) -> float:
        loss_nats = next(self.records).loss_nats
        mx.synchronize()
        return loss_nats


build = Ours
