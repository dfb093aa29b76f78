"""Ask a model from a program: a prompt or a conversation in, the answer's text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..config import require_seed
from ..fast.answer import generate
from ..fast.packed_modules import unpacking_first
from ..files.checkpoint import LoadedModel
from .sampling import Sampling


def answer(
    loaded: LoadedModel,
    prompt: str | Sequence[dict[str, Any]],
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The model's answer to a prompt, or to messages such as [{"role": "user", "content": "Who are you?"}].

    At temperature 0 each token is the most likely one; above, tokens are drawn with this seed. If the model
    carries an adapter, it answers with it. A prompt goes through the chat template; a model without one
    continues the prompt. Raises ValueError for settings out of range and messages that the template refuses.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    require_seed("seed", seed)
    sampling = Sampling(temperature, top_p)
    if temperature:
        mx.random.seed(seed)
    tokens = encode_prompt(loaded, prompt)
    with unpacking_first(loaded.model):
        reply = list(generate(loaded.model, tokens, max_tokens, loaded.tokenizer.stop_ids, sampling.choose))
    return loaded.tokenizer.decode(reply)


def encode_prompt(loaded: LoadedModel, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
    if not isinstance(prompt, str):
        return loaded.tokenizer.encode_prompt(prompt)
    if loaded.tokenizer.template is None:
        return loaded.tokenizer.encode_start(prompt)
    return loaded.tokenizer.encode_prompt([{"role": "user", "content": prompt}])
