"""Tokenize conversations and texts, and mark the tokens that the model is trained to predict (the targets).

A conversation is tokenized once, as a whole, exactly as the model reads it. A token is a target if any of its
characters belong to a reply, or if it ends the reply's turn. The twin in reference/ starts from tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import require_choice
from ..data import Example
from .rows import Conversation
from .tokenizer import ChatTokenizer
from .turns import TARGETS, Turn

MAX_LISTED = 5  # lines of a data file that one remark names


@dataclass(frozen=True)
class Encoded:
    """The examples of a file, and what the maximum length cut off or left out."""

    examples: list[Example]
    max_tokens: int
    num_cut: int  # examples that were longer than max_tokens
    left_out: tuple[str, ...]  # "file:line" of each example without a target in its first max_tokens tokens

    def remarks(self, kind: str) -> list[str]:
        """One sentence on cut examples, one on those left out, if there are any. `kind`: "training", say."""
        total, remarks = len(self.examples) + len(self.left_out), []
        if self.num_cut:
            verb = "was" if self.num_cut == 1 else "were"
            remarks.append(
                f"{self.num_cut} of {total} {kind} examples {verb} cut to {self.max_tokens} tokens"
            )
        if self.left_out:
            listed = ", ".join(self.left_out[:MAX_LISTED])
            more = f" and {len(self.left_out) - MAX_LISTED} more" if len(self.left_out) > MAX_LISTED else ""
            remarks.append(
                f"{len(self.left_out)} of {total} {kind} examples left out, without a target within "
                f"{self.max_tokens} tokens: {listed}{more}"
            )
        return remarks


def encode_all(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str, max_tokens: int
) -> list[Example]:
    """One example per conversation, cut to `max_tokens`; those without a target in that length are left out.

    Raises ValueError where none is left, or for a `targets` that is not one of TARGETS.
    """
    return encode_file(tokenizer, conversations, targets, max_tokens).examples


def encode_file(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str, max_tokens: int
) -> Encoded:
    """As `encode_all`, with a record of what was cut and left out."""
    require_choice("targets", targets, TARGETS)
    examples, left_out, num_cut = [], [], 0
    for conversation, whole in zip(
        conversations, encode_each(tokenizer, conversations, targets), strict=True
    ):
        cut = Example(whole.tokens[:max_tokens], whole.is_target[:max_tokens])
        if any(cut.is_target[1:]):  # the first token is never predicted
            examples.append(cut)
            num_cut += len(whole.tokens) > max_tokens
        else:
            left_out.append(conversation.where)
    if left_out and not examples:
        file = left_out[0].rpartition(":")[0]
        raise ValueError(f"{file}: no example has a target within the maximum of {max_tokens} tokens")
    return Encoded(examples, max_tokens, num_cut, tuple(left_out))


def encode(tokenizer: ChatTokenizer, conversation: Conversation, targets: str) -> Example:
    """One conversation, or one text, as an example of full length."""
    return next(encode_each(tokenizer, [conversation], targets))


def encode_each(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str
) -> Iterator[Example]:
    """The examples in order, at full length; every token of a plain text is a target."""
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
        yield mark_targets(tokenizer, whole, turns, all_tokens=targets == "all")


def mark_targets(tokenizer: ChatTokenizer, whole: str, turns: Sequence[Turn], all_tokens: bool) -> Example:
    """The tokens up to the end of the last turn, and EOS where no stop token ends that turn.

    A token is a target if it ends inside a reply, even where it starts before it: the first word of a reply
    may be one token with the space before it. A token without characters is a target if it lies in a reply.
    """
    tokens, starts, ends = tokenizer.encode_with_offsets(whole)
    is_target = [all_tokens] * len(tokens)
    for turn in turns:
        end = turn_end(turn, tokens, starts, tokenizer.stop_ids)
        for t in range(end):
            is_target[t] |= ends[t] > turn.start or starts[t] >= turn.start
    is_ended = end > 0 and tokens[end - 1] in tokenizer.stop_ids
    eos = [] if is_ended else [tokenizer.eos_id]
    return Example((*tokens[:end], *eos), (*is_target[:end], *(True for _ in eos)))


def turn_end(turn: Turn, tokens: Sequence[int], starts: Sequence[int], stop_ids: frozenset[int]) -> int:
    """The position after the turn's first stop token, or after its last word if it has no stop token."""
    for t, (token, start) in enumerate(zip(tokens, starts, strict=True)):
        if token in stop_ids and turn.end <= start < turn.next_start:
            return t + 1
    return sum(start < turn.end for start in starts)
