"""mlx-lm's model, LoRA layers, loss and AdamW, in the step that `mlx_lm.tuner.trainer.train` compiles.

That function does not expose its loop, so the step and the lines around it are copied here. By design it
counts one padding target per row, averages the means of micro-batches, and empties its cache at every step.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from benchmarks.cases import GROUP_SIZE, Case
from benchmarks.inputs import Inputs
from tests.peers.mlx_lm_terms import make_model, make_optimizer, their_batch


class MlxLm:
    def __init__(self, inputs: Inputs, case: Case) -> None:
        self.model = make_model(inputs.config)
        self.model.load_weights([(name, mx.array(array)) for name, array in inputs.weights.items()])
        self.model.set_dtype(getattr(mx, case.dtype))
        if case.bits:
            nn.quantize(self.model, GROUP_SIZE, case.bits)
        mx.eval(self.model.parameters())
        self.model.freeze()
        lora = {"rank": case.rank, "scale": case.lora.alpha / case.rank, "dropout": case.dropout}
        linear_to_lora_layers(self.model, inputs.config.num_hidden_layers, lora, use_dora=case.use_dora)
        if case.checkpointed:  # replaces __call__ of the class, for good
            trainer.grad_checkpoint(self.model.layers[0])
        self.optimizer = make_optimizer(case.training)
        self.state = [self.model.state, self.optimizer.state, mx.random.state]
        self.num_batches = case.micro_batches
        self.windows = cycle(inputs.windows)
        self.model.train()
        self.micro_step = self.compiled_step()

    def compiled_step(self) -> Any:
        loss_value_and_grad = nn.value_and_grad(self.model, trainer.default_loss)

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(batch: Any, prev_grad: Any, do_update: bool) -> Any:
            (lvalue, toks), grad = loss_value_and_grad(self.model, *batch)
            if prev_grad is not None:
                grad = tree_map(lambda x, y: x + y, grad, prev_grad)
            if do_update:
                grad = nn.average_gradients(grad)  # type: ignore[attr-defined]  # over the ranks
                if self.num_batches > 1:
                    grad = tree_map(lambda x: x / self.num_batches, grad)
                self.optimizer.update(self.model, grad)
                grad = None
            return lvalue, toks, grad

        return step

    def step(self) -> float:
        losses, n_tokens, grad = 0, 0, None
        for number, batch in enumerate(next(self.windows), 1):
            lvalue, toks, grad = self.micro_step(their_batch(batch), grad, number == self.num_batches)
            losses += lvalue
            n_tokens += toks
            mx.eval(self.state, losses, n_tokens, grad)
            trainer._clear_cache(trainer.TrainingArgs.clear_cache_threshold)
        mx.synchronize()
        return float(losses.item() / self.num_batches)  # type: ignore[attr-defined]


build = MlxLm
