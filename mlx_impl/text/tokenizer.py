"""Text to token ids and back, and conversations through the model's own chat template.

Source: Hugging Face `tokenizers` (byte-level BPE, Radford et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .conversation import Message
from .template import ChatTemplate

EXAMPLE_CHAT = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


class ChatTokenizer:
    """A tokenizer, the model's chat template if it has one, and the tokens that end an answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str] | None,
        eos_token: str,
        bos_token: str,
        eos_ids: Iterable[int] = (),
    ) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if not eos_token:
            raise ValueError(
                "a tokenizer must name the token that ends a turn, eos_token, and this one names none"
            )
        if eos_id is None:
            raise ValueError(f"the end-of-turn token {eos_token!r} must be in the vocabulary")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The post-processor adds BOS, but also moves offsets off spaces, so only encode_text uses it.
        self.post_processor, tokenizer.post_processor = tokenizer.post_processor, None
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.bos_id: int | None = tokenizer.token_to_id(bos_token)
        self.special_tokens = {"eos_token": eos_token, "bos_token": bos_token}
        self.template = None if template is None else ChatTemplate(template, self.special_tokens)
        self.replacement: str | None = None  # a chat template in place of the model's own
        self.stop_ids = frozenset({eos_id, *eos_ids, *self.end_of_turn_ids()})

    @property
    def vocab_size(self) -> int:
        """The largest token id plus 1: ids may have gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def end_of_turn_ids(self) -> list[int]:
        """The id of the first special token that the template prints after a reply, or an empty list."""
        try:
            text = self.render(EXAMPLE_CHAT, add_generation_prompt=False)
        except ValueError:  # no template, or one that refuses these messages
            return []
        reply_start = text.rfind(EXAMPLE_CHAT[-1]["content"])
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        tokens, starts, _ = self.encode_with_offsets(text)
        located = zip(tokens, starts, strict=True)
        return [token for token, start in located if start > reply_start >= 0 and token in special][:1]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, the post-processor included."""
        whole = Tokenizer.from_str(self.tokenizer.to_str())
        if self.post_processor is not None:
            whole.post_processor = self.post_processor
        whole.save(str(path))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS and EOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """The tokens, and the character at which each starts and the one before which it ends."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return (
            list(encoding.ids),
            [start for start, _ in encoding.offsets],
            [end for _, end in encoding.offsets],
        )

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a plain text, with one BOS if the tokenizer adds BOS, and with one EOS."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        plain, tokens = list(encoding.ids), list(encoding.ids)
        if self.post_processor is not None:
            tokens = list(self.post_processor.process(encoding, None, True).ids)
        if plain[:1] == [self.bos_id] and tokens[:2] == [self.bos_id] * 2:
            tokens = tokens[1:]
        if plain[-1:] == [self.eos_id] and tokens[-2:] == [self.eos_id] * 2:
            tokens = tokens[:-1]
        return tokens if tokens[-1:] == [self.eos_id] else [*tokens, self.eos_id]

    def num_start_tokens(self, text: str) -> int:
        """How many tokens, such as BOS, `encode_text` puts before the text's own."""
        plain, tokens = self.encode(text), self.encode_text(text)
        return next((n for n in range(len(tokens)) if tokens[n : n + len(plain)] == plain), 0)

    def encode_start(self, text: str) -> list[int]:
        """As `encode_text`, without the EOS at the end: the start of a text that goes on."""
        tokens = self.encode_text(text)
        return tokens[: self.num_start_tokens(text) + len(self.encode(text))]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def decode_with_special(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, special tokens included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """As `ChatTemplate.render`; ValueError also if the model has no chat template."""
        return self.require_template().render(messages, add_generation_prompt, tools)

    def require_template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError("the model must have a chat template to read messages, and has none")
        return self.template

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """The tokens of a prompt, up to where the model's answer begins."""
        return self.encode(self.render(messages, add_generation_prompt=True, tools=tools))
