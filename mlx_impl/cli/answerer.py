"""A loaded model with the settings of its answers, as `generate` uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from ..fast.answer import generate
from ..fast.packed_modules import unpacking_first
from ..files.checkpoint import LoadedModel
from ..run.memory_check import require_generation_memory
from ..run.sampling import Sampling
from ..text.streaming import stream_text


class Answerer:
    """Answers of at most `max_tokens` tokens."""

    def __init__(self, loaded: LoadedModel, max_tokens: int, sampling: Sampling, console: Console) -> None:
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.max_tokens, self.sampling, self.console = max_tokens, sampling, console
        self.num_tokens = 0  # of the last answer

    def tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """The answer's tokens as they come; ValueError where a memory limit would be exceeded."""
        for remark in require_generation_memory(self.loaded.model, [prompt], self.max_tokens):
            self.console.print(remark)
        stop_ids = self.tokenizer.stop_ids
        self.num_tokens = 0
        with unpacking_first(self.loaded.model):
            for token in generate(self.loaded.model, prompt, self.max_tokens, stop_ids, self.sampling.choose):
                self.num_tokens += 1
                yield token

    def stream(self, prompt: Sequence[int]) -> Iterator[str]:
        """Parts of the answer's text as they come."""
        return stream_text(self.tokens(prompt), self.tokenizer.decode)

    def whole(self, prompt: Sequence[int]) -> dict[str, Any]:
        """The answer as --json prints it."""
        tokens = list(self.tokens(prompt))
        reason = "length" if self.is_cut else "stop"
        return {"tokens": tokens, "text": self.tokenizer.decode(tokens), "finish_reason": reason}

    @property
    def is_cut(self) -> bool:
        return self.num_tokens == self.max_tokens

    def tell_if_cut(self) -> None:
        if self.is_cut:
            self.console.print(f"cut after {self.max_tokens} tokens: --max-tokens N allows more")
