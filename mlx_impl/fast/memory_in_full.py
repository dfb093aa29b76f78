"""Arrays as large as a weight that are there at once: weights unpacked, what DoRA makes of them, the head.

For a GPU and for the plain path. MLX allocates ahead of what it computes, so that a product holds its own
unpacked weight and those of the next two. DoRA also holds the squares of weights; on a GPU its update and
their sum too. On the plain path a step keeps every unpacked weight of DoRA. The counts are measured
(benchmarks/NOTES.md).
"""

from __future__ import annotations

from math import prod

from ..lora import DoRALinear, lora_layers
from ..model import CausalLM
from ..targets import shape_OI
from . import ops
from .head import PACKED_ROWS, head_module
from .packed import packed_of

# By whether weights are quantized and whether it is DoRA: in an evaluation before there are moments, in a
# later one, in training.
IN_FULL = {(True, False): (3, 3, 3), (False, True): (3, 3, 3), (True, True): (6, 5, 3)}
DORA_IN_FULL_ON_A_GPU = {(False, True): (6, 6, 6), (True, True): (9, 7, 7)}  # where V is formed
HEAD_PARTS = 2  # of a packed head on a CPU
PLAIN_IN_FULL = {(False, True): (7, 6, 7), (True, True): (14, 9, 0)}


def numbers_in_full(model: CausalLM, plain: bool) -> tuple[int, int, int, int]:
    """Numbers of weights in full and of arrays as large, as in IN_FULL; and those of a packed head."""
    layers = list(lora_layers(model).values())
    largest = max((prod(shape_OI(layer.linear)) for layer in layers), default=0)
    quantized = [layer for layer in layers if "scales" in layer.linear]
    kind = bool(quantized), any(isinstance(layer, DoRALinear) for layer in layers)
    counts = PLAIN_IN_FULL if plain else IN_FULL | (DORA_IN_FULL_ON_A_GPU if ops.on_gpu() else {})
    first, later, trained = (largest * count for count in counts.get(kind, (0, 0, 0)))
    if not plain:
        is_packed = packed_of(head_module(model)) is not None
        rows = (
            model.config.vocab_size
            if ops.on_gpu()
            else min(model.config.vocab_size, HEAD_PARTS * PACKED_ROWS)
        )
        return first, later, trained, rows * model.config.hidden_size * is_packed
    kept = sum(prod(shape_OI(layer.linear)) for layer in quantized if isinstance(layer, DoRALinear))
    return first, later, max(kept, trained), 0
