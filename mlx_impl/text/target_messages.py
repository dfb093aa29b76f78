"""Which messages of a conversation are targets, by `--targets` and by what the row itself says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .conversation import Conversation
from .shown import has_reasoning
from .template import Row
from .turns import Turn


def chosen_messages(conversation: Conversation, targets: str) -> list[int]:
    """The messages, from 0, whose place in the text decides which tokens are targets; always the last."""
    messages, untrained = conversation.messages, conversation.untrained
    chosen = {len(messages) - 1}
    if targets == "assistant":
        replies = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
        chosen |= {i for i in replies - untrained if i >= conversation.num_prompt}
    return sorted(chosen | untrained if targets == "all" else chosen)


def row_of(conversation: Conversation, targets: str, reasoning: str) -> Row:
    """What the template's process is asked: also which replies must be shown with their reasoning."""
    messages = conversation.messages
    chosen = range(len(messages)) if targets == "all" else chosen_messages(conversation, targets)
    must_show = [
        i
        for i in ([] if reasoning == "template" else chosen)
        if i not in conversation.untrained and has_reasoning(messages[i])
    ]
    return messages, conversation.tools, chosen_messages(conversation, targets), must_show


def with_trained(conversation: Conversation, turns: Sequence[Turn], targets: str) -> list[Turn]:
    """The turns of the chosen messages, each with whether the row lets it be a target."""
    chosen = chosen_messages(conversation, targets)
    return [
        replace(turn, is_trained=i not in conversation.untrained)
        for turn, i in zip(turns, chosen, strict=True)
    ]
