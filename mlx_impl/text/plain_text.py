"""Examples that need no chat template: a text, and for a base model a prompt with its completion.

Source: TRL's SFTTrainer joins a prompt and its completion without anything between, and adds EOS.
"""

from __future__ import annotations

from ..data import Example
from .conversation import Conversation
from .tokenizer import ChatTokenizer


def is_read_as_text(tokenizer: ChatTokenizer, conversation: Conversation) -> bool:
    """Whether no chat template is needed: a text, or a prompt and its completion where there is none."""
    return conversation.text is not None or (tokenizer.template is None and conversation.is_plain)


def encode_as_text(tokenizer: ChatTokenizer, conversation: Conversation, targets: str) -> Example:
    """A text, of which every token is a target; or a prompt, its completion and EOS.

    A token that belongs to both, such as a space and a word, is a target, as in a conversation.
    """
    if conversation.text is not None:
        tokens = tokenizer.encode_text(conversation.text)
        return Example(tuple(tokens), (True,) * len(tokens))
    prompt, completion = (message["content"] for message in conversation.messages)
    tokens = tokenizer.encode_text(prompt + completion)
    _, _, ends = tokenizer.encode_with_offsets(prompt + completion)
    num_before = tokenizer.num_start_tokens(prompt + completion)
    of_text = [targets == "all" or end > len(prompt) for end in ends]
    before, after = [targets == "all"] * num_before, [True] * (len(tokens) - num_before - len(ends))
    return Example(tuple(tokens), (*before, *of_text, *after))


def encode_question(tokenizer: ChatTokenizer, conversation: Conversation) -> list[int]:
    """The tokens up to where the last reply begins."""
    if is_read_as_text(tokenizer, conversation):
        return tokenizer.encode_start(conversation.question)
    return tokenizer.encode_prompt(conversation.messages[:-1], conversation.tools)
