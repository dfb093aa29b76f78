"""What the linears of a model keep on a CPU, for `memory_cpu.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from ..config import ModelConfig
from ..lora import DoRALinear, LoRALinear
from ..targets import shape_OI

BEFORE = ("q_proj", "k_proj", "v_proj")  # linears before attention
BLOCK = re.compile(r"layers\.(\d+)\.")
LINEARS = 7  # of a block
FLOAT = 4  # bytes of what is float32 whatever the model's type is


def sizes_on_a_cpu(layers: Mapping[str, LoRALinear], config: ModelConfig, itemsize: int) -> dict[str, Any]:
    """The fields for `memory_cpu.py`, and `more`.

    What dropout left of an input is kept, with its mask in float32, and the input is not. DoRA keeps outputs.
    """
    of_norms = config.hidden_size if itemsize < FLOAT else 0  # they keep x in float32 too
    drops = any(layer.dropout.p > 0 for layer in layers.values())
    queries = config.num_attention_heads * config.head_dim
    numbers = {
        True: 2 * of_norms - drops * (2 * config.hidden_size + queries),
        False: of_norms - drops * (config.hidden_size + queries),
    }
    more, more_after = (float(number) for number in numbers.values())
    for name, layer in layers.items():
        num_out, num_in = shape_OI(layer.linear)
        of_layer = (2 * num_in * drops + num_out * isinstance(layer, DoRALinear)) / config.num_hidden_layers
        more += of_layer
        more_after += 0 if name.rpartition(".")[2] in BEFORE else of_layer
    ranks = sum(layer.lora_a.shape[1] for layer in layers.values())
    return {
        "more": int(more),
        "more_after": int(more_after),
        "ranks": ranks // config.num_hidden_layers,
        "largest": max((prod(shape_OI(layer.linear)) for layer in layers.values()), default=0),
        "is_packed": any("scales" in layer.linear for layer in layers.values()),
        "is_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "drops": drops,
        "is_partial": len(layers) < LINEARS * config.num_hidden_layers,
        "below": min((int(BLOCK.findall(name)[0]) for name in layers), default=0),
    }
