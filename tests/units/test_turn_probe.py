"""Replies found together are those found one by one, in a number of renderings that grows slowly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest

from mlx_impl.text.conversation import Conversation
from mlx_impl.text.examples import encode
from mlx_impl.text.shown import require_reasoning_shown, require_tools_shown
from mlx_impl.text.turn_probe import find_all_turns
from mlx_impl.text.turns import find_turns
from tests.units import test_examples as templates
from tests.units.test_examples import chat, tokenizer_for

Messages = Sequence[dict[str, Any]]
DEEPSEEK = (  # a reply has no header of its own, and its thinking is left out
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<tool>' + m.content + '</tool>' }}{% else %}"
    "{{ '<Assistant>' + m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.name + '</call>' }}{% endfor %}{{ eos_token }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
NUMBERED = (  # every turn is introduced by another text
    "{% for m in messages %}{{ '<|im_start|>' ~ loop.index ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' ~ (messages | length + 1) ~ 'assistant\n' }}{% endif %}"
)
THINKS_AFTER_THE_QUESTION = (  # as Qwen3: what is shown of a reply depends on where the last question is
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] }}{% for c in m.tool_calls or [] %}{{ 'call ' + c.name }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = "CHATML LLAMA_3 LLAMA_2 MISTRAL GEMMA QWEN_3 OPENS_THINKING NO_END VICUNA TOOLS"
TEMPLATES = {name: getattr(templates, name) for name in NAMES.split()} | {
    "DEEPSEEK": DEEPSEEK,
    "NUMBERED": NUMBERED,
    "THINKS_AFTER_THE_QUESTION": THINKS_AFTER_THE_QUESTION,
    "TWICE": templates.CHATML + "{{ messages[-1].content }}",
    "FIRST_ONLY": "{{ messages[0].content }}{% for m in messages[-2:] %}{{ m.role + m.content }}{% endfor %}",
}
CHATML_INSIDE, THOUGHT = "a<|im_end|>\n<|im_start|>assistant\nb", "<think>\nw\n</think>\n\nd"
TEXTS = ("a", "bb", "", " c ", "\n", CHATML_INSIDE, THOUGHT, "[/INST] e")


class Counted:
    """A template that counts its renderings and the messages in them."""

    def __init__(self, source: str) -> None:
        def refuse(message: str) -> None:
            raise ValueError(message)

        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        self.template = environment.from_string(source)
        self.num_calls = self.num_messages = 0

    def __call__(self, messages: Messages, add_generation_prompt: bool, tools: Any = None) -> str:
        self.num_calls += 1
        self.num_messages += len(messages)
        special = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools}
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **special
            )
        except Exception as error:
            raise ValueError(str(error)) from None


def drawn(seed: int, num_pairs: int) -> list[dict[str, Any]]:
    """Questions and replies, some with calls and their results."""
    draw, messages = random.Random(seed), [{"role": "system", "content": "s"}] * (seed % 2)
    for _ in range(num_pairs):
        messages = [*messages, {"role": "user", "content": draw.choice(TEXTS)}]
        if seed % 3 == 2 and draw.random() < 0.6:
            calls = [{"name": draw.choice("xy")}]
            call: dict[str, Any] = {"role": "assistant", "content": draw.choice(TEXTS), "tool_calls": calls}
            messages += [call, {"role": "tool", "content": draw.choice(("noon", "a", "OK"))}]
        messages.append({"role": "assistant", "content": draw.choice(TEXTS)})
    return messages


def result_of(find: Any, *given: Any) -> Any:
    try:
        return find(*given)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_replies_found_together_are_those_found_one_by_one(source: str) -> None:
    """Fewer than MIN_TOGETHER and more; texts like the template's own, repeated, empty, with spaces."""
    for seed in range(18):
        messages, render = drawn(seed, 1 + seed % 7), Counted(source)
        chosen = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = sorted({*chosen, *range(seed % 4 == 3)})  # a message that is marked as no target
        try:
            whole = render(messages, False)
        except ValueError:
            continue
        expected = result_of(find_turns, render, whole, messages, chosen)
        assert result_of(find_all_turns, render, whole, messages, chosen) == expected, (seed, messages)


@pytest.mark.parametrize("name", ["CHATML", "LLAMA_3", "QWEN_3", "TOOLS", "THINKS_AFTER_THE_QUESTION"])
@pytest.mark.parametrize("with_calls", [False, True])
def test_a_conversation_of_twice_the_length_takes_about_twice_the_work(name: str, with_calls: bool) -> None:
    """One by one it takes four times."""
    work = []
    for num_pairs in (40, 80):
        messages: list[dict[str, Any]] = []
        for n in range(num_pairs):
            messages += [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]
            if with_calls:
                call = {"role": "assistant", "content": "", "tool_calls": [{"name": f"f{n}"}]}
                messages[-1:-1] = [call, {"role": "tool", "content": f"r {n}"}]
        render = Counted(TEMPLATES[name])
        whole = render(messages, False)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if "tool_calls" in TEMPLATES[name]:
            require_tools_shown(render, whole, messages, None)
        find_all_turns(render, whole, messages, replies)
        work.append(render.num_messages / len(messages))
    assert work[1] < 40 and work[1] < 1.3 * work[0]


def test_shown_reasoning_takes_two_renderings_for_all_replies() -> None:
    source = "{% for m in messages %}{{ m.role }}{{ m.thinking or '' }}{{ m.content }}{% endfor %}"
    both = [{"content": f"<think>b{n}</think>c", "thinking": f"a{n}"} for n in range(50)]
    messages = [{"role": "assistant", **fields} for fields in both]
    render = Counted(source)
    require_reasoning_shown(render, render(messages, False), messages, None, range(50))
    assert render.num_calls == 3
    silent = Counted(source.replace("m.thinking or", "(m.thinking if loop.index != 7) or"))
    with pytest.raises(ValueError, match='must show the "thinking" of message 7, and does not'):
        require_reasoning_shown(silent, silent(messages, False), messages, None, range(50))


def test_targets_of_many_replies_are_each_reply_and_its_end() -> None:
    """ChatML in single bytes: a token for each mark, each character of the role and each line break."""
    contents = [text for n in range(40) for text in ("d" * (n % 3 + 1), "ab"[n % 2])]
    expected: list[bool] = []
    for n, text in enumerate(contents):
        header = 1 + len("assistant" if n % 2 else "user") + 1
        expected += [False] * header + [n % 2 == 1] * (len(text) + 1) + [False]
    example = encode(tokenizer_for(templates.CHATML), chat(*contents), "assistant")
    assert list(example.is_target) == expected[:-1]


def test_a_conversation_is_encoded_with_the_same_targets_as_turn_by_turn() -> None:
    contents = [text for n in range(6) for text in (f"q{n}", f"a{n}")]
    tokenizer = tokenizer_for(templates.LLAMA_3)
    whole = encode(tokenizer, chat(*contents), "assistant")
    one_by_one = [False] * len(whole.tokens)
    for n in range(6):
        start = Conversation(chat(*contents).messages[: 2 * n + 2], None, "data.jsonl:1")
        last = encode(tokenizer, start, "completion")
        for t, is_target in enumerate(last.is_target):
            one_by_one[t] |= is_target
    assert list(whole.is_target) == one_by_one
