"""Tokenize conversations and texts, and mark the tokens that the model is trained to predict (the targets).

A conversation is tokenized once, as a whole, exactly as the model reads it. A token is a target if any of its
characters belong to a reply, or if it ends the reply's turn. The twin in reference/ starts from tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from ..config import require_choice
from ..data import Example
from .conversation import Conversation
from .example_store import ExampleStore
from .plain_text import encode_as_text, is_read_as_text
from .rows import MAX_LISTED, bad_rows_remark
from .shown import CHOICES
from .target_messages import row_of, with_trained
from .template import Rendered
from .tokenizer import ChatTokenizer
from .turns import TARGETS, Turn

Progress = Callable[[Sequence[Conversation]], Iterable[Conversation]]


@dataclass(frozen=True)
class Encoded:
    """The examples of a file, and what the maximum length cut off or left out."""

    examples: Sequence[Example]
    max_tokens: int
    num_cut: int  # examples that were longer than max_tokens
    left_out: tuple[str, ...]  # "file:line" of each example without a target in its first max_tokens tokens
    bad: tuple[str, ...] = ()  # the sentence of each example that the chat template refuses
    num_marked: int = 0  # of those left out, how many have replies that the row marks as no targets

    def remarks(self, kind: str) -> list[str]:
        """One sentence each on examples skipped, cut and left out. `kind`: "training", say."""
        total = len(self.examples) + len(self.left_out)
        remarks = bad_rows_remark(self.bad, len(self.bad) + total, kind)
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
                f"{self.max_tokens} tokens{marked_as_none(self.num_marked)}: {listed}{more}"
            )
        return remarks


def encode_all(
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    targets: str,
    max_tokens: int,
    reasoning: str = "require",
) -> list[Example]:
    """One example per conversation, cut to `max_tokens`; those without a target in that length are left out.

    Raises ValueError where none is left, for a `targets` that is not one of TARGETS, and for a reply whose
    reasoning the chat template does not show, unless `reasoning` is "template".
    """
    return [*encode_file(tokenizer, conversations, targets, max_tokens, reasoning).examples]


def encode_file(
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    targets: str,
    max_tokens: int,
    reasoning: str = "require",
    skip_bad: bool = False,
    progress: Progress = iter,
) -> Encoded:
    """As `encode_all`, with a record of what was cut, left out and, if bad ones are skipped, of those.

    `progress` yields the same conversations, and may show how many are done.
    """
    examples = ExampleStore()
    left_out, bad, num_cut, num_marked = [], [], 0, 0
    with closing(encode_or_error(tokenizer, conversations, targets, reasoning)) as results:
        for conversation, whole in zip(progress(conversations), results, strict=True):
            if isinstance(whole, ValueError):
                if not skip_bad:
                    raise whole
                bad.append(str(whole))
            elif any(whole.is_target[1:max_tokens]):  # the first token is never predicted
                examples.append(Example(whole.tokens[:max_tokens], whole.is_target[:max_tokens]))
                num_cut += len(whole.tokens) > max_tokens
            else:
                left_out.append(conversation.where)
                num_marked += bool(conversation.untrained)
    encoded = Encoded(examples, max_tokens, num_cut, tuple(left_out), tuple(bad), num_marked)
    require_examples(encoded, conversations)
    return encoded


def require_examples(encoded: Encoded, conversations: Sequence[Conversation]) -> None:
    """ValueError where none of the conversations has become an example."""
    if encoded.examples or not conversations:
        return
    file = conversations[0].where.rpartition(":")[0]
    if encoded.bad:
        raise ValueError(f"{file}: no example is left of {len(conversations)}; the first: {encoded.bad[0]}")
    why = marked_as_none(encoded.num_marked)
    raise ValueError(
        f"{file}: no example has a target within the maximum of {encoded.max_tokens} tokens{why}"
    )


def marked_as_none(num_marked: int) -> str:
    return f' ("weight" or "train" marks replies of {num_marked} as no targets)' if num_marked else ""


def encode(tokenizer: ChatTokenizer, conversation: Conversation, targets: str) -> Example:
    """One conversation, or one text, as an example of full length."""
    return next(encode_each(tokenizer, [conversation], targets))


def encode_each(
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    targets: str,
    reasoning: str = "require",
) -> Iterator[Example]:
    """The examples in order, at full length; ValueError at the first that cannot be encoded."""
    with closing(encode_or_error(tokenizer, conversations, targets, reasoning)) as results:
        for result in results:
            if isinstance(result, ValueError):
                raise result
            yield result


def encode_or_error(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], targets: str, reasoning: str
) -> Generator[Example | ValueError]:
    """The examples in order, at full length, or the error, with its place, of a conversation's own."""
    require_choice("targets", targets, TARGETS)
    require_choice("reasoning", reasoning, CHOICES)
    rows = (row_of(c, targets, reasoning) for c in conversations if not is_read_as_text(tokenizer, c))
    with ExitStack() as stack:
        rendered: Iterator[Rendered | ValueError] | None = None
        for conversation in conversations:
            if is_read_as_text(tokenizer, conversation):
                yield encode_as_text(tokenizer, conversation, targets)
                continue
            try:
                if rendered is None:
                    template = tokenizer.require_template()
                    rendered = stack.enter_context(closing(template.render_with_turns(rows)))
                result = next(rendered)
            except ValueError as error:
                raise ValueError(f"{conversation.where}: {error}") from None
            if isinstance(result, ValueError):
                yield ValueError(f"{conversation.where}: {result}")
                continue
            text, turns = result
            turns = with_trained(conversation, turns, targets)
            yield mark_targets(tokenizer, text, turns, all_tokens=targets == "all")


def mark_targets(tokenizer: ChatTokenizer, whole: str, turns: Sequence[Turn], all_tokens: bool) -> Example:
    """The tokens up to the end of the last turn, and EOS where no stop token ends that turn.

    A token is a target if it ends inside a reply, even where it starts before it: the first word of a reply
    may be one token with the space before it. A token without characters is a target if it lies in a reply.
    """
    tokens, starts, ends = tokenizer.encode_with_offsets(whole)
    is_target = [all_tokens] * len(tokens)
    for turn in turns:
        end = turn_end(turn, tokens, starts, tokenizer.stop_ids)
        first = min(bisect_right(ends, turn.start), bisect_left(starts, turn.start))
        is_target[first:end] = [turn.is_trained] * (end - first)
    is_ended = end > 0 and tokens[end - 1] in tokenizer.stop_ids
    eos = [] if is_ended else [tokenizer.eos_id]
    return Example((*tokens[:end], *eos), (*is_target[:end], *(turn.is_trained for _ in eos)))


def turn_end(turn: Turn, tokens: Sequence[int], starts: Sequence[int], stop_ids: frozenset[int]) -> int:
    """The position after the turn's first stop token, or after its last word if it has no stop token."""
    last = bisect_left(starts, turn.end)
    for t in range(last, bisect_left(starts, turn.next_start)):
        if tokens[t] in stop_ids:
            return t + 1
    return last
