"""`reference` behind the ladder's face, in float32 or float64."""

from __future__ import annotations

import numpy as np
import torch

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from reference.generate import greedy
from reference.lora import add_lora
from reference.model import CausalLM, load_arrays
from reference.train import batch_loss, evaluate, make_optimizer, train


def to_tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(batch.inputs_BT, dtype=torch.long),
        torch.tensor(batch.targets_BT, dtype=torch.long),
        torch.tensor(batch.mask_BT),
    )


class ReferenceTrainer:
    def __init__(
        self,
        spec: ModelConfig,
        weights: dict[str, np.ndarray],
        lora: LoRAConfig | None = None,
        factors: dict[str, np.ndarray] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.model = CausalLM(spec).to(dtype)
        load_arrays(self.model, weights)
        if lora is not None:
            add_lora(self.model, lora)
        if factors is not None:
            load_arrays(self.model, {**self.numpy(), **factors})

    def numpy(self) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in self.model.state_dict().items()}

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.model.eval()
        with torch.no_grad():
            logits_BTV = self.model(torch.tensor(tokens_BT, dtype=torch.long))
        return logits_BTV.numpy()

    def loss(self, batch: Batch) -> tuple[float, int]:
        with torch.no_grad():
            _, nats, num_targets = batch_loss(self.model, to_tensors(batch))
        return nats.item(), int(num_targets)

    def evaluate(self, batches: list[Batch]) -> float:
        return evaluate(self.model, [to_tensors(batch) for batch in batches])

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        self.model.zero_grad()
        batch_loss(self.model, to_tensors(batch))[0].backward()
        return {
            name: parameter.grad.numpy().copy()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def train(self, batches: list[Batch], training: TrainConfig) -> list[float]:
        optimizer = make_optimizer(self.model, training)
        return list(train(self.model, optimizer, [to_tensors(batch) for batch in batches]))

    def factors(self) -> dict[str, np.ndarray]:
        return {n: v for n, v in self.numpy().items() if n.endswith(("lora_a", "lora_b"))}

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
        tokens, logits = greedy(self.model, prompt, num_tokens)
        return tokens, logits.numpy()
