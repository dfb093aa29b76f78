"""A GPU kept from being handed work far ahead of what it has done, because all of that holds memory.

MLX queues up to ten graphs of kernels, and what a kernel used is free only when its graph is done: a step
that needs 8 GiB can hold 13. At MLX's memory limit it waits for the GPU instead. Here the limit is what the
step itself needs, so the GPU does not run dry either. Source: `eval_impl` in MLX's transforms.cpp (0.32.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
from mlx.utils import tree_flatten

from .data import Batch, Window
from .lora import lora_parameters
from .loss import CHUNK_LOGITS
from .model import CausalLM

STATES = 3  # copies of factors and moments: the new one, and the two that guard.py knows


def paced(windows: Iterable[Window], model: CausalLM, checkpointed: bool) -> Iterator[Window]:
    """The same windows, the memory limit set for each; a CPU does not run ahead and needs none."""
    if mx.default_device() != mx.gpu:
        yield from windows
        return
    before = mx.set_memory_limit(0)
    try:
        for window in windows:
            needed = max(step_bytes(model, batch, checkpointed) for batch in window)
            mx.set_memory_limit(min(before, needed))
            yield window
    finally:
        mx.set_memory_limit(before)


def step_bytes(model: CausalLM, batch: Batch, checkpointed: bool) -> int:
    """Weights, state, what the blocks keep for the backward pass, what one block and the head work with.

    As of a batch whose padding is computed too: enough for one whose padding is not.
    """
    config, num_blocks = model.config, model.config.num_hidden_layers
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    trained = 4 * sum(array.size for array in lora_parameters(model).values())
    queries, keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    # x and its norm, twice; q, the mix of values, and that in the order of tokens; k, v; gate, up, product
    numbers = 4 * config.hidden_size + 3 * queries + 2 * keys + 3 * config.intermediate_size
    itemsize = model.model.norm.weight.itemsize
    block = batch.inputs_BT.size * itemsize * numbers
    kept = (
        batch.inputs_BT.size * itemsize * config.hidden_size * num_blocks
        if checkpointed
        else num_blocks * block
    )
    logits = 4 * min(CHUNK_LOGITS, int(batch.mask_BT.sum()) * config.vocab_size)
    working = 5 * block if checkpointed else 2 * block  # a block made again, and its gradients
    return weights + (3 * STATES + 2) * trained + kept + max(working, 4 * logits)
