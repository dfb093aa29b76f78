"""Chat templates: what they are given, and that each rendering gives a text or a one-line error."""

from __future__ import annotations

import pytest

from mlx_impl.text.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "a<b"}, {"role": "assistant", "content": "é"}]
TOOLS = [{"name": "now", "parameters": {"z": 1, "a": "<"}}]


def rendered(source: str, **special: str) -> str:
    return ChatTemplate(source, special).render(MESSAGES, False, TOOLS)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<s></s>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a<b"}'),
        ("{{ messages[1].content | tojson }}", '"é"'),
        ("{{ tools[0].parameters | tojson(indent=1) }}", '{\n "z": 1,\n "a": "<"\n}'),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{% endfor %}", "0False1True"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.revindex }}{% endfor %}", "2221"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "a<b"),
        ("{% for m in nothing %}{% else %}none{% endfor %}", "none"),
        ("{% for k, v in messages[0].items() %}{{ k }} {% endfor %}", "role content "),
        ("{% for m in messages %}{{ (loop.previtem or {}).role }}{% endfor %}", "user"),
        ("{% set x = 1 %}{% generation %}{{ x }}{{ messages[1].content }}{% endgeneration %}!", "1é!"),
        (
            "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}",
            "2",
        ),
        ("  {% if true %}\nx{% endif %}", "x"),
        ("{{ 2 * 3 }}{{ '=' * 3 }}", "6==="),
        ("{{ add_generation_prompt }}", "False"),
    ],
)
def test_a_template_is_given_what_transformers_gives(source: str, text: str) -> None:
    assert rendered(source, bos_token="<s>", eos_token="</s>") == text


def test_source_date_epoch_fixes_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the examples of an earlier day can be rendered again."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert rendered("{{ strftime_now('%d %b %Y') }}") == "02 Jan 1970"
    assert rendered("{{ strftime_now('%Z') }}") == "UTC"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert rendered("{{ strftime_now('%Y') }}") >= "2025"


def test_the_time_is_the_same_in_every_rendering() -> None:
    template = ChatTemplate("{{ strftime_now('%H:%M:%S.%f') }}", {})
    assert template.render(MESSAGES, False) == template.render(MESSAGES, True)


def test_the_template_named_tool_use_renders_messages_with_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(MESSAGES, False) == template.render(MESSAGES, False, []) == "plain"
    assert template.render(MESSAGES, False, TOOLS) == "tools"
    with pytest.raises(ValueError, match='named "default", got'):
        ChatTemplate({"rag": "x"}, {}).render(MESSAGES, False)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{% for %}", "{{ a | nothing }}", "{% generation %}", "(" * 9 + "{{" + "(" * 9999]
)
def test_a_template_with_bad_syntax_is_a_one_line_error(source: str) -> None:
    with pytest.raises(ValueError, match=r"^the chat template cannot be read: [^\n]+$"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no\nsystem') }}", "no system"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ nothing * 2 }}", "undefined"),
        ("{{ messages.foo.bar }}", "undefined|no attribute"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__.os }}", "unsafe"),
        ("{{ strftime_now.__self__.__class__.x }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "unsafe|undefined"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_failing_rendering_is_a_one_line_error(source: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^the chat template refuses the messages: [^\n]*({reason})[^\n]*$"
    ):
        rendered(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' | center(3) }}{{ 'a'.rjust(2) }}{{ 7.25 | round(1) }}", " a  a7.2"),
        ("{{ '%s is %02d' % ('a', 1700000000) }}{{ '%5.1f' | format(2) }}", "a is 1700000000  2.0"),
        ("{{ '{{{}}}: {:>3}'.format(1700000000, 'b') }}", "{1700000000}:   b"),
        ("{{ 'a' ~ 1 ~ ('b' ~ none) }}{{ nothing ~ 'c' }}{{ [1] + [2] }}{{ nothing }}", "a1bNonec[1, 2]"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ 'a-b'.replace('-', '+') | replace('+', '/') }}{{ 'a\nb' | indent(1) }}", "a/ba\n b"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(f(7 % 4)) }}", "<<3>>"),
        ("{% macro f(context, function) %}{{ function }}{% endmacro %}{{ f(context=1, function=2) }}", "2"),
    ],
)
def test_short_texts_are_rendered_as_jinja_renders_them(source: str, text: str) -> None:
    assert rendered(source) == text
