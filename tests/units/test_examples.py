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

from mlx_impl.text.conversation import Conversation
from mlx_impl.text.examples import encode, encode_all, encode_each, encode_file
from mlx_impl.text.plain_text import encode_question
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


def marked(
    tokenizer: ChatTokenizer, conversation: Conversation, targets: str, reasoning: str = "require"
) -> str:
    """The text decoded from the tokens, with targets between « and »."""
    (example,), text = encode_each(tokenizer, [conversation], targets, reasoning), ""
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
    """It leaves out that of earlier turns, which has to be said."""
    row = chat("a", content, "c", "<think>\ny\n</think>\n\nd")
    text = marked(tokenizer_for(QWEN_3), row, "assistant", "template")
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


def trained_turns(*weights: int) -> Conversation:
    """Conversation of four messages; those with weight 0 are no targets."""
    return chat("a", "b", "c", "d", untrained=frozenset(i for i, weight in enumerate(weights) if not weight))


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL, GEMMA, VICUNA])
@pytest.mark.parametrize(
    ("weights", "targets", "expected"),
    [
        ((1, 0, 1, 1), "assistant", "d"),
        ((1, 1, 1, 0), "assistant", "b"),
        ((1, 0, 1, 1), "completion", "d"),
        ((1, 1, 1, 0), "completion", ""),
        ((1, 0, 1, 0), "assistant", ""),
        ((1, 1, 1, 1), "assistant", "bd"),
    ],
)
def test_a_message_that_is_marked_as_no_target_is_none(
    template: str, weights: tuple[int, ...], targets: str, expected: str
) -> None:
    """The tokens of a reply and its end are targets, or none of them is."""
    text = marked(tokenizer_for(template), trained_turns(*weights), targets)
    shown = [part.partition("»")[0].strip() for part in text.split("«")[1:]]
    assert [part[0] for part in shown] == [*expected]
    everything = marked(tokenizer_for(template), trained_turns(1, 1, 1, 1), targets)
    assert text.replace("«", "").replace("»", "") == everything.replace("«", "").replace("»", "")


def test_with_all_the_rest_is_a_target() -> None:
    text = marked(tokenizer_for(CHATML), trained_turns(0, 1, 1, 0), "all")
    assert text == (
        "«<|im_start|>user\n»a<|im_end|>«\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n»d<|im_end|>"
    )


def test_the_replies_of_a_prompt_are_no_targets_of_assistant() -> None:
    row = chat("a", "b", "c", "d", num_prompt=3)
    assert marked(tokenizer_for(CHATML), row, "assistant").count("«") == 1
    assert marked(tokenizer_for(CHATML), row, "assistant").endswith("«d<|im_end|>»")
    assert marked(tokenizer_for(CHATML), row, "all").startswith("«<|im_start|>user")


SHOWS_REASONING = CHATML.replace(
    "+ m.content", "+ ('<think>' + m.FIELD + '</think>' if m.FIELD else '') + m.content"
)
SHOWS_LAST_REASONING = SHOWS_REASONING.replace("if m.FIELD", "if m.FIELD and loop.last")
STRIPS_THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
FIELDS = {"reasoning_content": "why", "thinking": "why"}


def reasoned(*replies: dict[str, Any]) -> Conversation:
    asked = {"role": "user", "content": "a"}
    messages = [
        message for reply in replies for message in (asked, {"role": "assistant", "content": "b"} | reply)
    ]
    return Conversation(tuple(messages), None, "data.jsonl:7")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("targets", ["completion", "assistant", "all"])
def test_reasoning_that_the_template_shows_is_trained(field: str, targets: str) -> None:
    tokenizer = tokenizer_for(SHOWS_REASONING.replace("FIELD", field))
    text = marked(tokenizer, reasoned(FIELDS, FIELDS), targets)
    assert text.endswith("<think>why</think>b<|im_end|>»")


@pytest.mark.parametrize(
    ("template", "replies", "targets", "hidden"),
    [
        (CHATML, [FIELDS], "completion", 'the "reasoning_content" of message 2'),
        (CHATML, [FIELDS, FIELDS], "completion", 'the "reasoning_content" of message 4'),
        (CHATML, [FIELDS, {}], "assistant", 'the "reasoning_content" of message 2'),
        (CHATML, [FIELDS, {}], "all", 'the "reasoning_content" of message 2'),
        (SHOWS_LAST_REASONING, [FIELDS, FIELDS], "assistant", 'the "reasoning_content" of message 2'),
        (STRIPS_THINKING, [{"content": "<think>why</think>b"}], "all", "the <think> text of message 2"),
        (STRIPS_THINKING, [{"content": "why\n</think>b"}], "completion", "the <think> text of message 2"),
        (STRIPS_THINKING, [{"content": "x</think>b"}, {}], "assistant", "the <think> text of message 2"),
    ],
)
def test_reasoning_that_the_template_drops_is_refused_unless_it_is_left_to_it(
    template: str, replies: list[dict[str, Any]], targets: str, hidden: str
) -> None:
    tokenizer, row = tokenizer_for(template.replace("FIELD", "thinking")), reasoned(*replies)
    with pytest.raises(ValueError, match=rf"^data\.jsonl:7: the chat template must show {hidden}, and "):
        encode_all(tokenizer, [row], targets, 500)
    assert encode_all(tokenizer, [row], targets, 500, reasoning="template")


@pytest.mark.parametrize(
    ("template", "replies", "targets"),
    [
        (CHATML, [FIELDS, {}], "completion"),
        (SHOWS_LAST_REASONING, [FIELDS, FIELDS], "completion"),
        (STRIPS_THINKING, [{"content": "<think>\n\n</think>b"}], "completion"),
        (CHATML, [{"content": "<think>why</think>b"}], "completion"),
        (CHATML, [{"content": "what is <think>?"}], "completion"),
    ],
)
def test_reasoning_of_replies_that_are_not_trained_is_left_to_the_template(
    template: str, replies: list[dict[str, Any]], targets: str
) -> None:
    """As at generation: many templates drop the reasoning of earlier turns."""
    assert encode(tokenizer_for(template.replace("FIELD", "thinking")), reasoned(*replies), targets)


def test_reasoning_of_a_reply_marked_as_no_target_is_left_to_the_template() -> None:
    row = replace(reasoned(FIELDS, {}), untrained=frozenset({1}))
    assert encode(tokenizer_for(CHATML), row, "assistant") == encode(
        tokenizer_for(CHATML), replace(reasoned({}, {}), untrained=frozenset({1})), "assistant"
    )


def test_an_unknown_choice_of_reasoning_is_refused() -> None:
    with pytest.raises(ValueError, match="reasoning must be one of require, inline, template, got 'drop'"):
        encode_all(tokenizer_for(CHATML), [chat("a", "b")], "all", 20, "drop")


def test_a_template_that_needs_a_content_gets_an_empty_one_beside_tool_calls() -> None:
    """It is never given null, which it might print as None."""
    template = TOOLS.replace("{{ tools | tojson }}", "").replace("(m.content or '')", "m.content")
    reply = {"role": "assistant", "tool_calls": [{"name": "now"}]}
    row = Conversation(({"role": "user", "content": "a"}, reply), None, "data.jsonl:1")
    assert marked(tokenizer_for(template), row, "completion").endswith("\n«call now<|im_end|>»")
    with pytest.raises(
        ValueError, match='the chat template must show the "tool_calls" of message 2, and does'
    ):
        encode(tokenizer_for(CHATML), row, "completion")


ENCODES = "{{ c.function.arguments | tojson }}"
PRINTS = "{{ '' + c.function.arguments }}"  # as DeepSeek's templates do: fails for an object


@pytest.mark.parametrize("prints", [ENCODES, PRINTS])
def test_arguments_are_encoded_once_by_every_template(prints: str) -> None:
    template = TOOLS.replace("{{ tools | tojson }}", "").replace("{{ 'call ' + c.name }}", prints)
    call = {"function": {"name": "now", "arguments": {"zone": "é", "n": [1]}}}
    reply = {"role": "assistant", "tool_calls": [call]}
    row = Conversation(({"role": "user", "content": "a"}, reply), None, "data.jsonl:1")
    assert marked(tokenizer_for(template), row, "completion").endswith('«{"zone": "é", "n": [1]}<|im_end|>»')


@pytest.mark.parametrize(
    ("prompt", "completion", "targets", "expected"),
    [
        ("a: ", "b", "completion", "a: «b</s>»"),
        ("a: ", "b", "assistant", "a: «b</s>»"),
        ("a: ", "b", "all", "«a: b</s>»"),
        ("", "b", "completion", "«b</s>»"),
        ("a", "", "completion", "a«</s>»"),
        ("é", "😀</s>", "completion", "é«😀</s>»"),
    ],
)
def test_without_a_template_prompt_and_completion_are_joined(
    prompt: str, completion: str, targets: str, expected: str
) -> None:
    """TRL: prompt + completion, and EOS where the completion does not end with it."""
    tokenizer = ChatTokenizer(byte_level(), None, "</s>", "<s>")
    row = chat(prompt, completion, is_plain=True)
    assert marked(tokenizer, row, targets) == expected
    question = encode_question(tokenizer, row)
    assert encode(tokenizer, row, targets).tokens[: len(question)] == tuple(question)


def test_without_a_template_bos_comes_first_where_the_tokenizer_adds_it() -> None:
    base = byte_level()
    base.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", base.token_to_id("<s>") or 0)]
    )
    tokenizer = ChatTokenizer(base, None, "</s>", "<s>")
    assert marked(tokenizer, chat("a", "b", is_plain=True), "completion") == "<s>a«b</s>»"
    assert marked(tokenizer, chat("a", "b", is_plain=True), "all") == "«<s>ab</s>»"
    assert tokenizer.decode_with_special(encode_question(tokenizer, chat("a", "b", is_plain=True))) == "<s>a"


def test_a_token_that_prompt_and_completion_share_is_a_target() -> None:
    tokenizer = ChatTokenizer(sentence_piece(), None, "</s>", "<s>")
    example = encode(tokenizer, chat("a ", "b", is_plain=True), "completion")
    assert [tokenizer.tokenizer.id_to_token(t) for t in example.tokens] == ["▁a", "▁b", "</s>"]
    assert example.is_target == (False, True, True)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("prompt", ["a", "a ", "a: b ", "ab\n", ""])
@pytest.mark.parametrize("completion", ["b", " b", "b c d", "dab ", "\n"])
def test_a_completion_starts_where_the_tokens_leave_those_of_the_prompt(
    make: Any, prompt: str, completion: str
) -> None:
    """TRL's rule, by the tokenizer alone: the first target is the first token that differs."""
    base = make()
    whole, alone = (base.encode(text, add_special_tokens=False).ids for text in (prompt + completion, prompt))
    shared = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
    tokenizer = ChatTokenizer(make(), None, "</s>", "<s>")
    example = encode(tokenizer, chat(prompt, completion, is_plain=True), "completion")
    assert example.tokens == (*whole, tokenizer.eos_id)
    assert example.is_target == (*(n >= shared for n in range(len(whole))), True)


def test_with_a_template_prompt_and_completion_are_messages() -> None:
    row = chat("a", "b", is_plain=True)
    assert encode(tokenizer_for(CHATML), row, "all") == encode(tokenizer_for(CHATML), chat("a", "b"), "all")


def test_without_a_template_messages_are_refused() -> None:
    tokenizer = ChatTokenizer(byte_level(), None, "</s>", "<s>")
    with pytest.raises(
        ValueError, match=r"^data\.jsonl:1: the model must have a chat template to read messages"
    ):
        encode(tokenizer, chat("a", "b"), "completion")


def test_rows_that_the_template_refuses_are_skipped_if_asked() -> None:
    rows = [replace(chat(f"a{n}", "b"), where=f"data.jsonl:{n}") for n in range(200)]
    bad = (0, 3, 4, 150, 199)
    for n in bad:
        rows[n] = replace(rows[n], messages=(rows[n].messages[1], *rows[n].messages))
    encoded = encode_file(tokenizer_for(MISTRAL), rows, "completion", 100, skip_bad=True)
    assert len(encoded.examples) == 195
    assert [sentence.partition(": ")[0] for sentence in encoded.bad] == [f"data.jsonl:{n}" for n in bad]
    (remark,) = encoded.remarks("training")
    assert remark.startswith("5 of 200 training rows were skipped: data.jsonl:0: the chat template refuses")
    with pytest.raises(ValueError, match=r"^data\.jsonl:0: the chat template refuses the messages"):
        encode_file(tokenizer_for(MISTRAL), rows, "completion", 100)
    with pytest.raises(
        ValueError, match=r"^data\.jsonl: no example is left of 1; the first: data\.jsonl:3: "
    ):
        encode_file(tokenizer_for(MISTRAL), rows[3:4], "completion", 100, skip_bad=True)


def test_an_example_left_out_for_its_weights_says_so() -> None:
    rows = [chat("a", "b"), trained_turns(1, 0, 1, 0)]
    (remark,) = encode_file(tokenizer_for(CHATML), rows, "assistant", 500).remarks("training")
    reason = '("weight" or "train" marks replies of 1 as no targets): data.jsonl:1'
    assert remark == f"1 of 2 training examples left out, without a target within 500 tokens {reason}"
    with pytest.raises(ValueError, match=r'tokens \("weight" or "train" marks replies of 1 as no targets\)$'):
        encode_file(tokenizer_for(CHATML), rows[1:], "assistant", 500)
