"""Targets are the replies and their end-of-turn tokens, for many templates, and never the user's messages.

The expected targets are written by hand in the rendered text, between « and ».
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_impl.text.examples import encode, encode_all, encode_file
from mlx_impl.text.rows import Conversation
from mlx_impl.text.tokenizer import ChatTokenizer
from mlx_impl.text.turns import common_prefix_length

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot|>",
    "<|h|>",
    "<turn>",
    "<end>",
    "[INST]",
    "[/INST]",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|h|>' + m.role + '<|h|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|h|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
QWEN_3 = (  # thinking is stripped from earlier turns, and an empty block put into the last
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content %}"
    "{{ '<think>\n' + (thought or '') + '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENS_THINKING = QWEN_3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}").replace(
    "and loop.last", "and false"
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
VICUNA = (  # the generation prompt ends with a space, which merges with the reply's first word
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ENDS_LAST = NO_END + "{{ eos_token if messages[-1].role == 'assistant' }}"
TOOLS = (
    "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ 'call ' + c.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    """One token per byte, with a post-processor that would move offsets off spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: a space before every text, ▁ for spaces, one token for a space and a letter."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz<>/:\n"]
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(f"▁{c}" for c in "abcdu")])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", c) for c in "abcdu"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def chat(*contents: str, **more: Any) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))
    return Conversation(messages, None, "data.jsonl:1", **more)


def marked(tokenizer: ChatTokenizer, conversation: Conversation, targets: str) -> str:
    """The text decoded from the tokens, with targets between « and »."""
    example, text = encode(tokenizer, conversation, targets), ""
    parts: list[tuple[bool, list[int]]] = []
    for token, is_target in zip(example.tokens, example.is_target, strict=True):
        if not parts or parts[-1][0] != is_target:
            parts.append((is_target, []))
        parts[-1][1].append(token)
    for is_target, tokens in parts:
        part = tokenizer.tokenizer.decode(tokens, skip_special_tokens=False)
        text += f"«{part}»" if is_target else part
    return text


def tokenizer_for(template: str, eos: str = "</s>") -> ChatTokenizer:
    return ChatTokenizer(byte_level(), template, eos, "<s>")


CASES = {
    "chatml": (
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»",
    ),
    "llama 3": (
        LLAMA_3,
        "<s><|h|>user<|h|>\n\na<|eot|><|h|>assistant<|h|>\n\n«b<|eot|>»"
        "<|h|>user<|h|>\n\nc<|eot|><|h|>assistant<|h|>\n\n«d<|eot|>»",
    ),
    "llama 2": (LLAMA_2, "<s>[INST] a [/INST]« b </s>»<s>[INST] c [/INST]« d </s>»"),
    "mistral": (MISTRAL, "<s>[INST] a[/INST]« b</s>»[INST] c[/INST]« d</s>»"),
    "gemma": (
        GEMMA,
        "<s><turn>user\na<end>\n<turn>model\n«b<end>»\n<turn>user\nc<end>\n<turn>model\n«d<end>»",
    ),
    "qwen 3": (
        QWEN_3,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nd<|im_end|>»",
    ),
    "a generation prompt that opens a thought": (
        OPENS_THINKING,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»",
    ),
    "vicuna": (VICUNA, "user: a assistant: «b</s>»user: c assistant: «d</s>»"),
    "no token ends a turn": (NO_END, "user: a\n«assistant: b»\nuser: c\n«assistant: d</s>»"),
    "a token ends the last turn": (ENDS_LAST, "user: a\n«assistant: b»\nuser: c\n«assistant: d\n</s>»"),
}


@pytest.mark.parametrize(("template", "expected"), CASES.values(), ids=CASES)
def test_every_reply_and_its_end_is_a_target(template: str, expected: str) -> None:
    assert marked(tokenizer_for(template), chat("a", "b", "c", "d"), "assistant") == expected


@pytest.mark.parametrize(("template", "expected"), CASES.values(), ids=CASES)
def test_the_last_reply_alone_is_the_completion(template: str, expected: str) -> None:
    *before, last = expected.split("«")
    unmarked = "".join(before).replace("»", "")
    assert marked(tokenizer_for(template), chat("a", "b", "c", "d"), "completion") == f"{unmarked}«{last}"


@pytest.mark.parametrize(("template", "expected"), CASES.values(), ids=CASES)
def test_with_all_every_token_of_the_same_text_is_a_target(template: str, expected: str) -> None:
    plain = expected.replace("«", "").replace("»", "")
    assert marked(tokenizer_for(template), chat("a", "b", "c", "d"), "all") == f"«{plain}»"


@pytest.mark.parametrize("template", [template for template, _ in CASES.values()], ids=CASES)
def test_an_example_begins_with_the_prompt_of_generation(template: str) -> None:
    """The two are tokenized separately. One template here opens a turn otherwise when it generates."""
    tokenizer, conversation = tokenizer_for(template), chat("a", "b", "c", "d")
    prompt = tokenizer.render(conversation.messages[:-1], True)
    example = encode(tokenizer, conversation, "completion")
    if tokenizer.render(conversation.messages, False).startswith(prompt):
        tokens = tokenizer.encode_prompt(conversation.messages[:-1])
        assert list(example.tokens[: len(tokens)]) == tokens
        assert example.is_target.index(True) == len(tokens)
    else:
        assert template is OPENS_THINKING


@pytest.mark.parametrize("content", ["b", "<think>\nx\n</think>\n\nb"])
def test_thinking_is_a_target_where_the_template_shows_it(content: str) -> None:
    text = marked(tokenizer_for(QWEN_3), chat("a", content, "c", "<think>\ny\n</think>\n\nd"), "assistant")
    assert text.endswith("assistant\n«<think>\ny\n</think>\n\nd<|im_end|>»")
    assert "assistant\n«b<|im_end|>»" in text


def test_tool_calls_are_targets_and_system_and_tool_messages_are_not() -> None:
    messages: Sequence[dict[str, Any]] = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "d"},
    )
    conversation = Conversation(tuple(messages), None, "data.jsonl:1", tools=({"name": "now"},))
    assert marked(tokenizer_for(TOOLS), conversation, "assistant") == (
        '[{"name": "now"}]<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n'
        "<|im_start|>assistant\n«call now<|im_end|>»\n<|im_start|>tool\nnoon<|im_end|>\n"
        "<|im_start|>assistant\n«d<|im_end|>»"
    )


SHOWS_NO_TOOLS = TOOLS.replace("{{ tools | tojson }}", "")
CALLS_IN_SILENCE = CHATML.replace("m.content", "m.content | string")  # null is shown as None
SHOWS_SILENT_CALLS = TOOLS.replace("m.tool_calls or []", "([] if m.content else m.tool_calls or [])")


@pytest.mark.parametrize(
    ("template", "hidden"),
    [
        (SHOWS_NO_TOOLS, '"tools"'),
        (CALLS_IN_SILENCE, '"tools"'),
        (TOOLS.replace("m.tool_calls", "none"), 'the "tool_calls" of message 2'),
        (
            TOOLS.replace("m.content or ''", "m.content | string").replace("m.tool_calls", "none"),
            "of message 2",
        ),
        (SHOWS_SILENT_CALLS, 'the "tool_calls" of message 4'),
    ],
)
@pytest.mark.parametrize("targets", ["completion", "assistant", "all"])
def test_tools_and_calls_that_the_template_hides_are_an_error(
    template: str, hidden: str, targets: str
) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]}
    answer, user = {"role": "tool", "content": "noon"}, {"role": "user", "content": "a"}
    messages: tuple[dict[str, Any], ...] = (user, call, answer, {**call, "content": "b"}, answer, {**call})
    conversation = Conversation(messages, None, "data.jsonl:7", tools=({"name": "now"},))
    with pytest.raises(ValueError, match=r"^data\.jsonl:7: the chat template must show .*" + hidden):
        encode(tokenizer_for(template), conversation, targets)


def test_tool_calls_without_tool_definitions_are_targets_too() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]}
    conversation = Conversation(({"role": "user", "content": "a"}, call), None, "data.jsonl:1")
    text = marked(tokenizer_for(SHOWS_NO_TOOLS), conversation, "completion")
    assert text.endswith("assistant\n«call now<|im_end|>»")


REPEATS = CHATML.replace("{% for", "{{ 'last: ' + messages[-1].content + '\n' }}{% for", 1)


@pytest.mark.parametrize("targets", ["completion", "assistant", "all"])
def test_a_template_that_repeats_a_reply_is_an_error(targets: str) -> None:
    """The user's words between the two copies would be taken for a part of the reply."""
    with pytest.raises(
        ValueError, match=r"^data\.jsonl:1: .* must show message 4 once, and shows it 2 times"
    ):
        encode(tokenizer_for(REPEATS), chat("a", "b", "c", "d"), targets)


@pytest.mark.parametrize("reply", ["", " b ", "\n", "a", "assistant", "é😀", "b<|im_end|>c"])
def test_an_unusual_reply_is_a_target_to_its_end(reply: str) -> None:
    text = marked(tokenizer_for(CHATML), chat("a", reply), "completion")
    assert text == f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«{reply}<|im_end|>»"


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize(("one", "other"), [("", ""), ("x", ""), ("", "y"), ("x", "y"), ("xa", "ya")])
def test_the_common_prefix_length_of_two_texts(length: int, one: str, other: str) -> None:
    assert common_prefix_length("ab" * length + one, "ab" * length + other) == 2 * length


def test_a_conversation_that_leaves_no_marker_free_is_refused() -> None:
    taken = string.ascii_letters + string.digits + "".join(map(chr, range(0xE000, 0xF8FF)))
    row = chat("a", taken)
    assert "\uf8ff" not in marked(tokenizer_for(CHATML), row, "completion")
    with pytest.raises(ValueError, match=r"^data\.jsonl:1: a conversation must not contain every letter"):
        encode(tokenizer_for(CHATML), chat("a", taken + "\uf8ff"), "completion")


def test_a_reply_that_the_template_trims_is_found() -> None:
    assert marked(tokenizer_for(GEMMA), chat(" a ", " b "), "completion").endswith("model\n«b<end>»")


def test_targets_are_right_for_a_tokenizer_that_prepends_a_space() -> None:
    """A reply's first token is ▁b, as when the model generates it after [/INST]."""
    tokenizer = ChatTokenizer(sentence_piece(), LLAMA_2, "</s>", "<s>")
    example, id_of = encode(tokenizer, chat("a", "b", "c", "d"), "assistant"), tokenizer.tokenizer.token_to_id
    trained = [t for t, is_target in zip(example.tokens, example.is_target, strict=True) if is_target]
    names = [tokenizer.tokenizer.id_to_token(token) or "" for token in trained]
    assert [name.replace("▁", "") for name in names if name.strip("▁")] == ["b", "</s>", "d", "</s>"]
    assert example.tokens.count(id_of("<s>") or -1) == 2
    prompt = tokenizer.encode_prompt(chat("a", "b").messages[:1])
    assert list(example.tokens[: len(prompt)]) == prompt


def test_a_first_word_that_merges_with_the_prompts_last_space_is_a_target() -> None:
    tokenizer = ChatTokenizer(sentence_piece(), VICUNA, "</s>", "<s>")
    example = encode(tokenizer, chat("a", "b", "c", "dd"), "assistant")
    trained = [t for t, is_target in zip(example.tokens, example.is_target, strict=True) if is_target]
    assert [tokenizer.tokenizer.id_to_token(t) for t in trained] == ["▁b", "</s>", "▁d", "d", "</s>"]


@pytest.mark.parametrize("targets", ["completion", "assistant", "all"])
def test_every_token_of_a_plain_text_is_a_target(targets: str) -> None:
    text = Conversation((), None, "data.jsonl:1", text=" a b")
    assert marked(tokenizer_for(CHATML), text, targets) == "« a b</s>»"


def test_examples_cut_or_left_out_are_counted_and_named() -> None:
    tokenizer = tokenizer_for(CHATML)
    rows = [chat("a", "b"), replace(chat("x" * 50, "b"), where="data.jsonl:2"), chat("a", "b" * 50)]
    encoded = encode_file(tokenizer, rows, "completion", 40)
    assert [len(example.tokens) for example in encoded.examples] == [22, 40]
    assert encoded.remarks("training") == [
        "1 of 3 training examples was cut to 40 tokens",
        "1 of 3 training examples left out, without a target within 40 tokens: data.jsonl:2",
    ]
    assert encode_all(tokenizer, rows, "all", 40)[1].tokens == encode(tokenizer, rows[1], "all").tokens[:40]


def test_a_file_without_any_example_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^data\.jsonl: no example has a target within the maximum of 20"):
        encode_all(tokenizer_for(CHATML), [chat("x" * 50, "b")], "completion", 20)
    assert encode_file(tokenizer_for(CHATML), [], "completion", 20).examples == []


def test_an_unknown_value_of_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="targets must be one of completion, assistant, all, got 'last'"):
        encode_all(tokenizer_for(CHATML), [], "last", 20)
