"""`mlx_impl` behind the ladder's face."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from mlx_impl.generate import generate
from mlx_impl.lora import add_lora, lora_parameters, select_linears
from mlx_impl.model import CausalLM
from mlx_impl.optim import make_optimizer
from mlx_impl.train import batch_loss, evaluate, to_arrays, train

NO_TOKEN = -1  # an end-of-turn token that never comes


class MlxTrainer:
    def __init__(
        self,
        spec: ModelConfig,
        weights: dict[str, np.ndarray],
        lora: LoRAConfig | None = None,
        factors: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.model = CausalLM(spec)
        self.model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
        if lora is not None:
            add_lora(self.model, select_linears(self.model, lora), lora)
        if factors is not None:
            given = [(name, mx.array(value)) for name, value in factors.items()]
            self.model.load_weights(given, strict=False)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.model.eval()
        return np.array(self.model(mx.array(tokens_BT)))

    def loss(self, batch: Batch) -> tuple[float, int]:
        _, nats, num_targets = batch_loss(self.model, to_arrays(batch))
        return nats.item(), num_targets.item()

    def evaluate(self, batches: list[Batch]) -> float:
        return evaluate(self.model, batches)[0]

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        _, gradients = nn.value_and_grad(self.model, batch_loss)(self.model, to_arrays(batch))
        return {name: np.array(value) for name, value in tree_flatten(gradients)}

    def train(self, batches: list[Batch], training: TrainConfig, compiled: bool = False) -> list[float]:
        records = train(self.model, make_optimizer(training), batches, compiled)
        return [record.loss_nats for record in records]

    def factors(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in lora_parameters(self.model).items()}

    def base(self) -> dict[str, np.ndarray]:
        everything = dict(tree_flatten(self.model.parameters()))
        return {
            name.replace(".linear.", "."): np.array(value)
            for name, value in everything.items()
            if not name.endswith(("lora_a", "lora_b"))
        }

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return list(generate(self.model, prompt, num_tokens, eos_id=NO_TOKEN))
