"""Text to token numbers and back, and conversations through the model's own chat template.

Source: Hugging Face `tokenizers` (byte-level BPE, Radford et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .rows import Message
from .template import ChatTemplate

PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


class ChatTokenizer:
    """A tokenizer, a chat template where the model has one, and the tokens that end an answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str] | None,
        eos_token: str,
        bos_token: str,
        eos_ids: Iterable[int] = (),
    ) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"the end-of-turn token {eos_token!r} must be in the vocabulary")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # What puts BOS before a text. It also moves offsets, off spaces, so it acts in encode_text only.
        self.post_processor, tokenizer.post_processor = tokenizer.post_processor, None
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.bos_id: int | None = tokenizer.token_to_id(bos_token)
        self.special_texts = {"eos_token": eos_token, "bos_token": bos_token}
        self.template = None if template is None else ChatTemplate(template, self.special_texts)
        self.stop_ids = frozenset({eos_id, *eos_ids, *self.end_of_turn()})

    @property
    def vocab_size(self) -> int:
        """One more than the highest number of a token: numbers may have gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def end_of_turn(self) -> list[int]:
        """The first special token that the template puts after a reply, if it does."""
        try:
            text = self.render(PROBE, add_generation_prompt=False)
        except ValueError:  # no template, or one that wants other messages
            return []
        said = text.rfind(PROBE[-1]["content"])
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        tokens, starts, _ = self.encode_with_offsets(text)
        return [t for t, start in zip(tokens, starts, strict=True) if start > said >= 0 and t in special][:1]

    def save(self, path: Path) -> None:
        """As a `tokenizer.json`, with what puts BOS before a text."""
        whole = Tokenizer.from_str(self.tokenizer.to_str())
        if self.post_processor is not None:
            whole.post_processor = self.post_processor
        whole.save(str(path))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """The tokens, and the numbers of the characters at which each starts and before which it ends."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return (
            list(encoding.ids),
            [start for start, _ in encoding.offsets],
            [end for _, end in encoding.offsets],
        )

    def encode_text(self, text: str) -> list[int]:
        """A text that is no conversation: BOS where the tokenizer puts one, EOS; each once."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        plain, tokens = list(encoding.ids), list(encoding.ids)
        if self.post_processor is not None:
            tokens = list(self.post_processor.process(encoding, None, True).ids)
        if plain[:1] == [self.bos_id] and tokens[:2] == [self.bos_id] * 2:
            tokens = tokens[1:]
        if plain[-1:] == [self.eos_id] and tokens[-2:] == [self.eos_id] * 2:
            tokens = tokens[:-1]
        return tokens if tokens[-1:] == [self.eos_id] else [*tokens, self.eos_id]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def decode_all(self, tokens: Sequence[int]) -> str:
        """With the special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The text that the model reads; ValueError when the template refuses the messages."""
        return self.require_template().render(messages, add_generation_prompt, tools)

    def require_template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError("the model must have a chat template for messages, and has none")
        return self.template

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """The tokens after which the model is to answer."""
        return self.encode(self.render(messages, add_generation_prompt=True, tools=tools))
