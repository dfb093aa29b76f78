"""transformers' model with PEFT's adapter, from this project's configurations and under its names.

Nothing in either library is patched. Both compute some steps in float32 whatever the model's dtype (RMSNorm,
RoPE angles, the loss). `AllDouble` turns each request for float32 into one for float64, so that a float64
model computes in float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlx_impl.config import LoRAConfig, ModelConfig
from mlx_impl.data import Batch

Arrays = dict[str, np.ndarray]
IGNORED = -100  # the label that transformers' loss ignores
# PEFT's names of trained tensors -> this project's, whose factors are (in, out) and not (out, in).
SUFFIXES = {
    ".lora_A.default.weight": ".lora_a",
    ".lora_B.default.weight": ".lora_b",
    ".lora_magnitude_vector.default.weight": ".magnitude",
}


class AllDouble(TorchFunctionMode):
    """A context in which PyTorch computes in float64 where float32 is requested."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        chosen: Callable[..., Any] = torch.Tensor.double if function is torch.Tensor.float else function
        wide = {n: torch.float64 if v is torch.float32 else v for n, v in (kwargs or {}).items()}
        return chosen(*(torch.float64 if a is torch.float32 else a for a in args), **wide)


def hugging_face_model(spec: ModelConfig) -> nn.Module:
    """transformers' model for this configuration; its weights are set by the caller."""
    kind = "Qwen3" if spec.qk_norm else "Qwen2" if spec.qkv_bias else "Mistral"
    settings = asdict(spec)
    if spec.sliding_window is None:
        settings.pop("sliding_window")
        kind = kind.replace("Mistral", "Llama")
    scaling = settings.pop("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":  # the other fields are llama3's
        scaling = {"rope_type": "linear", "factor": scaling["factor"]}
    settings["rope_parameters"] = {"rope_theta": settings.pop("rope_theta"), **scaling}
    for switch in ("qkv_bias", "qk_norm"):
        settings.pop(switch)
    config = getattr(transformers, f"{kind}Config")(
        **settings, max_position_embeddings=64, attn_implementation="sdpa", pad_token_id=None
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def peft_config(lora: LoRAConfig, num_layers: int) -> peft.LoraConfig:
    targets = lora.target_modules
    last = None if lora.num_layers == -1 else list(range(num_layers - lora.num_layers, num_layers))
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=last,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        task_type="CAUSAL_LM",
    )


class PeftTwin:
    """A model of transformers with an adapter of PEFT."""

    def __init__(
        self,
        spec: ModelConfig,
        weights: Arrays,
        lora: LoRAConfig,
        factors: Arrays,
        dtype: torch.dtype = torch.float64,
        widened: bool = True,
    ) -> None:
        self.precision = AllDouble if widened and dtype is torch.float64 else nullcontext
        with self.precision():
            model = hugging_face_model(spec)
            result = model.load_state_dict({n: torch.tensor(a) for n, a in weights.items()}, strict=False)
            assert not result.unexpected_keys
            assert set(result.missing_keys) <= ({"lm_head.weight"} if spec.tie_word_embeddings else set())
            self.model = peft.get_peft_model(model, peft_config(lora, spec.num_hidden_layers)).to(dtype)
        trained = self.trained()
        assert trained.keys() == factors.keys(), "PEFT adapts other linears or names factors otherwise"
        with torch.no_grad():
            for name, value in factors.items():
                trained[name].copy_(torch.tensor(value).T if value.ndim == 2 else torch.tensor(value))

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters under this project's names, in PEFT's orientation."""
        return {
            canonical_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def scales(self) -> dict[str, float]:
        """The scale of each adapted linear, by name."""
        return {
            name.removeprefix("base_model.model."): module.scaling["default"]
            for name, module in self.model.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        }

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.model.eval()
        with self.precision(), torch.no_grad():
            return self.model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()

    def mean_nats(self, batch: Batch, num_items: int) -> Tensor:
        """transformers' own loss, which shifts the labels itself and divides the sum by `num_items`."""
        tokens_BS = np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], axis=1)
        labels_BT = np.where(batch.mask_BT, batch.targets_BT, IGNORED)
        labels_BS = np.pad(labels_BT, ((0, 0), (1, 0)), constant_values=IGNORED)
        tokens, labels = (torch.tensor(a, dtype=torch.long) for a in (tokens_BS, labels_BS))
        with self.precision():
            return self.model(tokens, labels=labels, num_items_in_batch=num_items).loss

    def gradients(self, batch: Batch) -> Arrays:
        self.model.zero_grad()
        self.mean_nats(batch, int(batch.mask_BT.sum())).backward()
        return {name: oriented(p.grad) for name, p in self.trained().items() if p.grad is not None}

    def factors(self) -> Arrays:
        return {name: oriented(p.detach()) for name, p in self.trained().items()}


def canonical_name(peft_name: str) -> str:
    name = peft_name.removeprefix("base_model.model.")
    suffix = next(s for s in SUFFIXES if name.endswith(s))
    return name.removesuffix(suffix) + SUFFIXES[suffix]


def oriented(value: Tensor) -> np.ndarray:
    return (value.T if value.ndim == 2 else value).numpy().copy()
