"""Conversations and texts -> examples: tokens, and of each whether the model is trained to predict it.

The whole conversation is tokenized once, as the model reads it, and a token is a target when some of it
stands in a reply or it is the token that ends its turn. Differs from reference/, which is handed the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import require_choice
from ..data import Example
from .rows import Conversation
from .tokenizer import ChatTokenizer
from .turns import TARGETS, Turn

SHOWN = 5  # lines that a sentence names


@dataclass(frozen=True)
class Encoded:
    """The examples of a file, and what the maximum has cost."""

    examples: list[Example]
    max_tokens: int
    num_cut: int  # examples that were longer
    left_out: tuple[str, ...]  # "file:line" of those without a target within the maximum

    def remarks(self, kind: str) -> list[str]:
        """Sentences about what was cut and left out; none where nothing was. `kind` is "training", say."""
        total, remarks = len(self.examples) + len(self.left_out), []
        if self.num_cut:
            verb = "was" if self.num_cut == 1 else "were"
            remarks.append(
                f"{self.num_cut} of {total} {kind} examples {verb} cut to {self.max_tokens} tokens"
            )
        if self.left_out:
            shown = ", ".join(self.left_out[:SHOWN])
            more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
            remarks.append(
                f"{len(self.left_out)} of {total} {kind} examples left out, without a target within "
                f"{self.max_tokens} tokens: {shown}{more}"
            )
        return remarks


def encode_all(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str, max_tokens: int
) -> list[Example]:
    """Every conversation as an example of at most `max_tokens`; those left without a target are left out."""
    return encode_file(tokenizer, conversations, targets, max_tokens).examples


def encode_file(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str, max_tokens: int
) -> Encoded:
    """The same, with what was cut and left out. ValueError where nothing is left."""
    require_choice("targets", targets, TARGETS)
    examples, left_out, num_cut = [], [], 0
    for conversation, whole in zip(
        conversations, encode_each(tokenizer, conversations, targets), strict=True
    ):
        cut = Example(whole.tokens[:max_tokens], whole.is_target[:max_tokens])
        if any(cut.is_target[1:]):
            examples.append(cut)
            num_cut += len(whole.tokens) > max_tokens
        else:
            left_out.append(conversation.where)
    if left_out and not examples:
        file = left_out[0].rpartition(":")[0]
        raise ValueError(f"{file}: no example has a target within the maximum of {max_tokens} tokens")
    return Encoded(examples, max_tokens, num_cut, tuple(left_out))


def encode(tokenizer: ChatTokenizer, conversation: Conversation, targets: str) -> Example:
    """One example, not cut. Of a text every token is a target."""
    return next(encode_each(tokenizer, [conversation], targets))


def encode_each(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str
) -> Iterator[Example]:
    """The examples in order, not cut; many conversations are rendered at a time."""
    chats = ((c.messages, c.tools) for c in conversations if c.text is None)
    rendered: Iterator[tuple[str, list[Turn]]] | None = None
    for conversation in conversations:
        if conversation.text is not None:
            tokens = tokenizer.encode_text(conversation.text)
            yield Example(tuple(tokens), (True,) * len(tokens))
            continue
        try:
            if rendered is None:
                rendered = tokenizer.require_template().render_with_turns(chats, targets == "assistant")
            whole, turns = next(rendered)
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from None
        yield mark(tokenizer, whole, turns, everything=targets == "all")


def mark(tokenizer: ChatTokenizer, whole: str, turns: Sequence[Turn], everything: bool) -> Example:
    """The tokens to the end of the last turn. Where no end-of-turn token stands there, EOS does.

    A reply's first word may take along the space that the prompt ends with, so it is the end of a token that
    counts; a token without characters counts where it stands.
    """
    tokens, starts, ends = tokenizer.encode_with_offsets(whole)
    is_target = [everything] * len(tokens)
    for turn in turns:
        end = end_of(turn, tokens, starts, tokenizer.stop_ids)
        for t in range(end):
            is_target[t] |= ends[t] > turn.start or starts[t] >= turn.start
    is_ended = end > 0 and tokens[end - 1] in tokenizer.stop_ids
    eos = [] if is_ended else [tokenizer.eos_id]
    return Example((*tokens[:end], *eos), (*is_target[:end], *(True for _ in eos)))


def end_of(turn: Turn, tokens: Sequence[int], starts: Sequence[int], stop_ids: frozenset[int]) -> int:
    """How many tokens there are up to the first that ends the turn, or up to the end of what was said."""
    for t, (token, start) in enumerate(zip(tokens, starts, strict=True)):
        if token in stop_ids and turn.end <= start < turn.limit:
            return t + 1
    return sum(start < turn.end for start in starts)
