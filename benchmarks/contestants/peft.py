"""transformers' model with PEFT's adapter and PyTorch's AdamW, in the step of transformers' Trainer.

The labels are already shifted, so that the model reads as many positions as the others. Runs on the GPU if
there is one.
"""

from __future__ import annotations

import warnings
from itertools import cycle
from typing import Any

import numpy as np
import peft
import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from mlx_impl.data import Batch
from tests.peers.twin import IGNORED, hugging_face_model, peft_config


class Peft:
    def __init__(self, inputs: Inputs, case: Case, compiled: bool = False) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = hugging_face_model(inputs.config)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.weights.items()}
        model.load_state_dict(tensors, strict=not inputs.config.tie_word_embeddings)
        model.to(self.device, getattr(torch, case.dtype))
        if case.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = peft_config(case.lora, inputs.config.num_hidden_layers)
        self.model: Any = peft.get_peft_model(model, adapter).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=case.training.learning_rate, weight_decay=0.0)
        self.call = torch.compile(self.model) if compiled else self.model
        self.windows = cycle([[self.arguments(batch) for batch in window] for window in inputs.windows])

    def arguments(self, batch: Batch) -> dict[str, Any]:
        labels_BT = torch.tensor(np.where(batch.mask_BT, batch.targets_BT, IGNORED), dtype=torch.long)
        inputs_BT = torch.tensor(batch.inputs_BT, dtype=torch.long)
        shifted = labels_BT.to(self.device)
        return {"input_ids": inputs_BT.to(self.device), "labels": shifted, "shift_labels": shifted}

    def step(self) -> float:
        window = next(self.windows)
        num_targets = sum((batch["labels"] != IGNORED).sum() for batch in window)
        total = 0.0
        for batch in window:
            loss = self.call(**batch, num_items_in_batch=num_targets, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)  # waits for the device


def build(inputs: Inputs, case: Case, compiled: bool = False) -> Peft:
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return Peft(inputs, case, compiled)
