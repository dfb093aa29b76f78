"""The plain twin of `Decoder.at_targets`: every slot is computed, padding and prompts in all blocks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_impl.model import Decoder


def every_slot(decoder: Decoder, tokens_BT: mx.array, positions_N: mx.array, **layout: Any) -> mx.array:
    x_BTD = decoder(tokens_BT, None, layout.get("segment_BT"))
    return x_BTD.flatten(0, 1)[positions_N]
