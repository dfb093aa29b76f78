"""Chat templates give the same text and the same tokens as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_impl.text.columns import to_conversation
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.units.test_examples import CASES, TOOLS, byte_level

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": " a<b "},
    {"role": "assistant", "content": "é\n"},
    {"role": "user", "content": "c"},
]
CALLS = [
    MESSAGES[0],
    {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]},
    {"role": "tool", "content": "noon"},
]
DEFINITIONS = [{"type": "function", "function": {"name": "né<", "parameters": {"z": 1, "a": []}}}]
INDENTED = (
    "{{ tools | tojson(indent=2) }}{% for m in messages %}"
    "{% generation %}{{ loop.length }}{% endgeneration %}"
)
TEMPLATES = {**{name: template for name, (template, _) in CASES.items()}, "tools": TOOLS}
TEMPLATES["indented"] = INDENTED + "{% if loop.last %}{% break %}{% endif %}{% endfor %}"


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_text_and_tokens_equal_those_of_transformers(template: str, add_generation_prompt: bool) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    ours = ChatTokenizer(byte_level(), template, "</s>", "<s>")
    for messages, tools in [(MESSAGES, None), *([(CALLS, DEFINITIONS)] if "tools" in template else [])]:
        expected = theirs.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        text = ours.render(messages, add_generation_prompt, tools)
        assert text == expected
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


SHOWS_REASONING = (
    "{% for m in messages %}{{ m.role }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.thinking is defined %}[{{ m.thinking }}]{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "reply",
    [
        {"content": "b"},
        {"content": "b", "reasoning_content": "why"},
        {"content": "b", "reasoning": "why"},
        {"content": "b", "thinking": "why"},
        {"content": "b", "thinking": "why", "reasoning_content": None, "reasoning": None},
        {"content": "b", "tool_calls": [{"function": {"name": "now", "arguments": {"zone": "é", "n": [1]}}}]},
    ],
)
def test_a_row_is_rendered_as_transformers_renders_its_messages(reply: dict[str, Any]) -> None:
    """Read from a data file: reasoning under all of its names, null keys, tool calls."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **reply}]
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    ours = ChatTokenizer(byte_level(), SHOWS_REASONING, "</s>", "<s>")
    expected = theirs.apply_chat_template(messages, chat_template=SHOWS_REASONING, tokenize=False)
    rows = [{"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}]
    for row in rows:
        assert ours.render(to_conversation(row, "data.jsonl:1", {})[0].messages, False) == expected
