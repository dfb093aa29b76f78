"""The smallest adapter: the seven required members, here over `mlx_impl`. The ladder's README shows it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_impl.lora import FACTORS, add_lora
from mlx_impl.model import CausalLM
from mlx_impl.optim import LoRAOptimizer
from mlx_impl.train import batch_loss, to_arrays, train
from tests.lora_ladder.protocol import Dialect


class MinimalTrainer:
    dialect = Dialect()  # or what your trainer does differently on purpose

    def __init__(self, spec, weights, lora, factors):
        self.model = CausalLM(spec)
        self.model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
        if lora is not None:
            add_lora(self.model, lora)
            self.model.load_weights([(name, mx.array(f)) for name, f in factors.items()], strict=False)

    def logits(self, tokens_BT):
        return np.array(self.model.eval()(mx.array(tokens_BT)))

    def loss(self, batch):
        nats, num_targets = batch_loss(self.model.eval(), to_arrays(batch))
        return nats.item(), num_targets.item()

    def gradients(self, batch):
        (_, num_targets), grads = nn.value_and_grad(self.model.eval(), batch_loss)(
            self.model, to_arrays(batch)
        )
        return {name: np.array(grad / num_targets) for name, grad in tree_flatten(grads)}

    def train(self, windows, training):
        records = train(self.model, LoRAOptimizer(training), windows, training, compiled=False)
        return [record.loss_nats for record in records]

    def factors(self):
        return {n: np.array(p) for n, p in tree_flatten(self.model.parameters()) if n.endswith(FACTORS)}

    def base(self):
        rest = [(n, p) for n, p in tree_flatten(self.model.parameters()) if not n.endswith(FACTORS)]
        return {name.replace(".linear.", "."): np.array(array) for name, array in rest}
