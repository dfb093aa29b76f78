"""PEFT 0.21.2 on a model of transformers 5.23.0, trained by torch's AdamW: the loop of PEFT's documentation.

Whatever is PEFT's or transformers' is used as it is: model, adapter, the loss with `num_items_in_batch`,
schedules, LoRA+, merging, files, generation. The loop around it is the adapter's, because PEFT has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from tests.lora_ladder.protocol import Arrays, Batch, Dialect, LoRAConfig, ModelConfig, TrainConfig
from tests.peers.twin import IGNORED, SUFFIXES, canonical_name, hugging_face_model, oriented, peft_config

CHECKPOINTING = {"use_reentrant": False}  # transformers' default
NAME = "default"  # of an adapter, if none is given


class PeftTrainer:
    dialect = Dialect()
    optimizer_from = "torch.optim, made by the adapter"
    schedule_from = "transformers' get_scheduler"

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        require_possible(spec, lora)
        model: Any = hugging_face_model(spec)
        self.model = model
        self.model.generation_config.eos_token_id = None
        tensors = {name: torch.tensor(value) for name, value in weights.items()}
        self.model.load_state_dict(tensors, strict=not spec.tie_word_embeddings)
        if lora is not None and factors is not None:
            self.model = get_peft_model(self.model, peft_config(lora, spec.num_hidden_layers))
            with torch.no_grad():
                for name, tensor in self.trained().items():
                    tensor.copy_(torch.tensor(factors[name].T))

    def trained(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {canonical_name(name): p for name, p in named if is_factor(name) and p.requires_grad}

    @staticmethod
    def inputs(batch: Batch) -> dict[str, torch.Tensor]:
        """What a collator gives: tokens, their labels, and which of them are padding."""
        if batch.segment_BT is not None:
            raise NotImplementedError("transformers packs examples with another attention only")
        tokens_BS = np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], axis=1)
        labels_BS = np.where(np.pad(batch.mask_BT, ((0, 0), (1, 0))), tokens_BS, IGNORED)
        given = {"input_ids": tokens_BS, "labels": labels_BS, "attention_mask": np.ones_like(tokens_BS)}
        return {name: torch.tensor(value, dtype=torch.long) for name, value in given.items()}

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model.eval()(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()

    def mean_nats(self, batch: Batch, num_items: int) -> torch.Tensor:
        return self.model(**self.inputs(batch), num_items_in_batch=num_items).loss

    def loss(self, batch: Batch) -> tuple[float, int]:
        count = int(batch.mask_BT.sum())
        self.model.eval()
        with torch.no_grad():
            return self.mean_nats(batch, count).item() * count, count

    def gradients(self, batch: Batch) -> Arrays:
        self.model.eval().zero_grad()
        self.mean_nats(batch, int(batch.mask_BT.sum())).backward()
        return self.grads()

    def grads(self) -> Arrays:
        return {name: oriented(p.grad) for name, p in self.trained().items() if p.grad is not None}

    def made(self, training: TrainConfig) -> tuple[Any, Any]:
        """The optimizer and its schedule."""
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[training.optimizer]
        decay, ratio = training.weight_decay, training.loraplus_lr_ratio
        settings = {"lr": training.learning_rate, "weight_decay": decay}
        if ratio == 1:
            optimizer = kind([p for p in self.model.parameters() if p.requires_grad], **settings)
        else:
            optimizer = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **settings
            )
        constant = training.lr_schedule == "constant"
        schedule = "constant_with_warmup" if constant else training.lr_schedule
        return optimizer, transformers.get_scheduler(
            schedule, optimizer, training.warmup_steps, training.iters
        )

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        transformers.set_seed(training.seed)
        optimizer, schedule = self.made(training)
        self.checkpoint(training.grad_checkpoint)
        self.model.train()
        return [self.update(window, optimizer, schedule, training) for window in windows]

    def update(self, window: Sequence[Batch], optimizer: Any, schedule: Any, training: TrainConfig) -> float:
        """One update; the mean nats per target before it."""
        count, nats = sum(int(batch.mask_BT.sum()) for batch in window), 0.0
        for batch in window:
            mean = self.mean_nats(batch, count)
            mean.backward()
            nats += mean.item()
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return nats

    def checkpoint(self, is_on: bool) -> None:
        if is_on:
            self.model.gradient_checkpointing_enable(CHECKPOINTING)
            self.model.enable_input_require_grads()
        else:
            self.model.gradient_checkpointing_disable()

    def train_checkpointed(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.train(windows, replace(training, grad_checkpoint=True))

    def learning_rates(self, training: TrainConfig) -> list[float]:
        rates, (_, schedule) = [], self.made(training)
        for _ in range(training.iters):
            rates.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return rates

    def apply_gradients(self, gradients: Sequence[Arrays], training: TrainConfig) -> None:
        optimizer, schedule = self.made(training)
        for update in gradients:
            for name, tensor in self.trained().items():
                tensor.grad = torch.tensor(update[name]).T.contiguous()
            optimizer.step()
            schedule.step()

    def set_dropout_masks(self, masks: Arrays) -> None:
        for name, module in self.model.named_modules():
            name = name.removeprefix("base_model.model.")
            if name in masks:
                module.lora_dropout[NAME] = GivenMask(masks[name], module.lora_dropout[NAME].p)

    def factors(self) -> Arrays:
        return {name: oriented(p.detach()) for name, p in self.trained().items()}

    def base(self) -> Arrays:
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        every = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        return {n: v.numpy().copy() for n, v in every.items() if not is_factor(n) and n not in tied}

    def merge(self) -> None:
        self.model.merge_adapter()

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def save_adapter(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder))

    def load_adapter(self, folder: Path) -> None:
        self.model = PeftModel.from_pretrained(self.model, str(folder), is_trainable=True)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens = torch.tensor([prompt])
        settings = transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        self.model.eval()
        with torch.no_grad():
            answer = self.model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
            )
        return answer[0, len(prompt) :].tolist()


class GivenMask(torch.nn.Module):
    """In the place of dropout: keeps what it is told to keep, and the last token, which predicts none."""

    def __init__(self, keep_BTI: np.ndarray, p: float) -> None:
        super().__init__()
        self.scaled_BSI = torch.tensor(np.pad(keep_BTI, ((0, 0), (0, 1), (0, 0)), constant_values=1)) / (
            1 - p
        )

    def forward(self, x_BSI: torch.Tensor) -> torch.Tensor:
        return x_BSI * self.scaled_BSI if self.training else x_BSI


def require_possible(spec: ModelConfig, lora: LoRAConfig | None) -> None:
    """NotImplementedError for what no model or adapter of theirs is."""
    switches = (spec.qkv_bias, spec.qk_norm, spec.sliding_window is not None)
    if spec.hidden_size % spec.num_attention_heads:
        raise NotImplementedError("transformers wants a width that is a multiple of the heads")
    if sum(switches) > 1:
        raise NotImplementedError("transformers' Qwen2, Qwen3 and Mistral have one of these each")
    if lora is not None and isinstance(lora.target_modules, str) and lora.num_layers != -1:
        raise NotImplementedError("PEFT takes no expression together with layers")


def is_factor(name: str) -> bool:
    return any(suffix.removesuffix("weight") in name for suffix in SUFFIXES)
