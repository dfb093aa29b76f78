"""Hostile chat templates: each rendering ends soon, with a text or a one-line error, and leaves no process.

The bounds on wall-clock time are generous: the limit is on CPU time, and machines are busy.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from mlx_impl.text import template_process
from mlx_impl.text.conversation import Conversation
from mlx_impl.text.examples import encode_all, encode_each
from mlx_impl.text.template import ChatTemplate, Row
from tests.nightly import mostly_at_night
from tests.tiny_folder import TEMPLATE
from tests.units.test_examples import CHATML, tokenizer_for

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MAX_SECONDS = 30.0  # of wall-clock time, on any machine
DOUBLED = "{% set ns = namespace(a=['x']) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
GROWING = "{% set s = namespace(x='ab') %}{% for i in range(40) %}{% set s.x = WHAT %}{% endfor %}"
HOSTILE = {
    # Too much memory, time, texts, width, length.
    "nested lists printed": DOUBLED + "{{ ns.a }}",
    "powers while it is read": "{{ 9 ** (9 ** 9) }}",
    "many texts kept": "{% set ns = namespace(a=[]) %}{% for i in range(2000) %}"
    "{% set ns.a = ns.a + ['x' * 16000000 ~ i] %}{% endfor %}",
    "a wide field": "{{ ('%30000000000d' % 1) | length }}",
    "a long answer": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    # More of each kind.
    "nested lists joined": DOUBLED + "{{ (ns.a ~ '') | length }}",
    "nested lists as a text": DOUBLED + "{{ (ns.a | string) | length }}",
    "nested lists as JSON": DOUBLED + "{{ (ns.a | tojson) | length }}",
    "nested lists compared": DOUBLED.replace("ns", "o") + DOUBLED + "{{ ns.a == o.a }}",
    "nested lists in an error": DOUBLED + "{{ raise_exception(ns.a) }}",
    "big integers": "{% set x = ('f' * 16000000) | int(base=16) %}"
    "{% for i in range(100) %}{% set y = x * x %}{% endfor %}",
    "a tower of powers": "{% set n = namespace(x=9) %}{% for i in range(9) %}"
    "{% set n.x = n.x ** 9 ** 9 %}{% endfor %}",
    "lists sorted in a loop": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "loops in loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a long text": "{{ ('x' * 100000000000) | length }}",
    "a text that grows": GROWING.replace("WHAT", "s.x ~ s.x"),
    "a text that is escaped": "{{ ('<' * 900000000) | escape | length }}",
    "a text that is wrapped": "{{ ('a ' * 9999999) | wordwrap(1, wrapstring='b' * 9999) | length }}",
    "a product of lists": "{% for a in [messages] * 999999999 %}{% for b in a %}{% endfor %}{% endfor %}",
    "a search that goes back": "{{ ('a' * 3000000).count('a' * 1500000 ~ 'b' ~ 'a' * 1499990) }}"
    "{% for i in range(99999) %}{% set x = ('ab' * 999999).replace('b', 'cd') %}{% endfor %}",
    "a chain of lazy filters": "{% set ns = namespace(x=[1]) %}{% for i in range(90000) %}"
    "{% set ns.x = ns.x | map('string') %}{% endfor %}{{ ns.x | list }}",
}


@contextmanager
def peak_of_workers() -> Iterator[Callable[[], int]]:
    """The peak memory of any child process, sampled every few milliseconds."""
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            for child in psutil.Process().children():
                try:
                    peak[0] = max(peak[0], child.memory_info().rss)
                except psutil.Error:  # it has ended
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        is_over.set()
        thread.join()


def workers() -> list[psutil.Process]:
    """The worker processes in use; the spare one is ended first."""
    gc.collect()
    while template_process.SPARE:
        template_process.SPARE.pop().end()
    return [
        p for p in psutil.Process().children() if "mlx_impl.text.template_worker" in " ".join(p.cmdline())
    ]


@pytest.mark.parametrize("source", mostly_at_night(HOSTILE.values(), 3), ids=HOSTILE)
def test_a_hostile_template_ends_in_one_sentence(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MAX_CPU_SECONDS", 1)  # to save time
    before, started = workers(), time.monotonic()
    with (
        peak_of_workers() as peak,
        pytest.raises(ValueError, match=r"^the (process that renders the )?chat template [^\n]{,1100}$"),
    ):
        ChatTemplate(source, {}).render(MESSAGES, False)
    assert time.monotonic() - started < MAX_SECONDS
    assert peak() < 2 * template_process.MAX_BYTES
    assert [worker for worker in workers() if worker not in before] == []


@pytest.mark.parametrize(
    ("source", "rule"),
    mostly_at_night(
        [
            (HOSTILE["a long answer"], "refuses the messages: it makes a text longer than 10[0-9]{5}$"),
            (HOSTILE["many texts kept"], "must keep within 1 GiB of memory, and takes more$"),
            (HOSTILE["lists sorted in a loop"], "must render in 3 seconds of CPU time, and takes longer$"),
            (HOSTILE["powers while it is read"], "must render in 3 seconds of CPU time, and takes longer$"),
        ],
        3,
    ),
)
def test_the_error_states_the_limit(source: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^the chat template {rule}"):
        ChatTemplate(source, {}).render(MESSAGES, False)


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit, which is three, where what follows from it is tested."""
    monkeypatch.setattr(template_process, "MAX_CPU_SECONDS", 1)


@pytest.mark.usefixtures("one_second")
def test_after_exceeding_a_limit_a_template_refuses_at_once() -> None:
    """Otherwise each later request would use up the whole time limit again."""
    template = ChatTemplate("{% if messages %}" + HOSTILE["loops in loops"] + "{% endif %}", {})
    assert template.render([], False) == ""
    with pytest.raises(ValueError, match="CPU time") as first:
        template.render(MESSAGES, False)
    started = time.monotonic()
    for _ in range(1000):
        with pytest.raises(ValueError, match="CPU time") as later:
            template.render([], False)
        assert str(later.value) == str(first.value)
    assert time.monotonic() - started < MAX_SECONDS


@pytest.mark.usefixtures("one_second")
def test_the_conversation_that_exceeds_a_limit_is_named() -> None:
    """Although many conversations are rendered in one request."""
    hang = "{% if messages[0].content == 'hang' %}" + HOSTILE["loops in loops"] + "{% endif %}"
    contents = ["a"] * 20 + ["hang"] + ["a"] * 20
    rows = [
        Conversation(({"role": "user", "content": text}, MESSAGES[1]), None, f"data.jsonl:{i + 1}")
        for i, text in enumerate(contents)
    ]
    tokenizer = tokenizer_for(CHATML + hang)
    with pytest.raises(ValueError, match=r"^data\.jsonl:21: the chat template must render in 3 seconds"):
        encode_all(tokenizer, rows, "assistant", 100)


@pytest.mark.parametrize("length", mostly_at_night([1, 100_000, 9_000_000], 2))
@pytest.mark.parametrize("num_rows", mostly_at_night([1, 7], 1))
def test_messages_and_answers_of_any_length_pass(length: int, num_rows: int) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    message = {"role": "user", "content": "é" * length}
    assert template.render([message], False) == message["content"]
    rows: list[Row] = [((message, MESSAGES[1]), None, [1], [])] * num_rows
    results = [result for result in template.render_with_turns(rows) if not isinstance(result, ValueError)]
    assert [len(text) for text, _ in results] == [length + 1] * num_rows


def test_after_thousands_of_renderings_text_and_memory_are_the_same() -> None:
    template = ChatTemplate(TEMPLATE, {})
    first, before = template.render(MESSAGES, True), psutil.Process().memory_info().rss
    worker = workers()[-1]
    for _ in range(5000):
        assert template.render(MESSAGES, True) == first
    assert worker.is_running() and worker.memory_info().rss < 100 * 2**20
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


def test_threads_may_share_a_template() -> None:
    template, wrong = ChatTemplate("{{ messages[0].content }}", {}), []

    def use(name: str) -> None:
        for i in range(200):
            text = template.render([{"role": "user", "content": f"{name}{i}"}], False)
            wrong.extend([text] * (text != f"{name}{i}"))

    threads = [threading.Thread(target=use, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_killed_worker_is_a_one_line_error() -> None:
    template = ChatTemplate(TEMPLATE, {})
    template.process.child.kill()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^the process that renders the chat template .* by SIGKILL$"):
            template.render(MESSAGES, False)


def test_one_process_is_kept_for_the_next_template_and_knows_nothing_of_the_last() -> None:
    before = workers()
    templates = [ChatTemplate(TEMPLATE, {"eos_token": "x"}) for _ in range(3)]
    assert len(workers()) == len(before) + 3
    templates.clear()
    (spare,) = template_process.SPARE
    template = ChatTemplate("{{ eos_token is defined }}", {})
    assert template.process is spare and not template_process.SPARE
    assert template.render(MESSAGES, False) == "False"
    del spare, template
    assert workers() == before


def test_a_spare_process_that_has_died_is_not_used() -> None:
    workers()
    ChatTemplate(TEMPLATE, {})
    template_process.SPARE[0].child.kill()
    template_process.SPARE[0].child.wait()
    assert ChatTemplate("x", {}).render(MESSAGES, False) == "x"


def test_messages_that_json_cannot_hold_are_a_one_line_error() -> None:
    template = ChatTemplate(TEMPLATE, {})
    inside: list[object] = []
    inside.append(inside)
    for content in (object(), inside, 10**5000):
        with pytest.raises(ValueError, match=r"^the messages must be values that JSON can hold: [^\n]+$"):
            template.render([{"role": "user", "content": content}], False)
    assert template.render(MESSAGES, False)
    rows = [
        Conversation(({"role": "user", "content": text}, MESSAGES[1]), None, "d:7") for text in ("a", {1})
    ]
    with pytest.raises(ValueError, match=r"^d:7: the messages must be values that JSON can hold"):
        encode_all(tokenizer_for(CHATML), rows[1:], "all", 100)
    examples = encode_each(tokenizer_for(CHATML), rows, "all")
    assert next(examples)
    with pytest.raises(ValueError, match=r"^d:7: the messages must be values that JSON can hold"):
        next(examples)


def test_deeply_nested_messages_do_not_end_the_worker() -> None:
    template = ChatTemplate("{{ (messages | tojson) | length }}", {})
    for depth in (100, 700, 900, 1000, 100_000):
        value: list[object] = []
        for _ in range(depth):
            value = [value]
        with suppress(ValueError):
            template.render([{"role": "user", "content": value}], False)
    assert template.render([], False) == "2"


def test_a_silent_worker_is_ended_after_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(TEMPLATE, {})
    template.process.child.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(template_process, "MAX_SILENT_SECONDS", 0.5)
    with pytest.raises(ValueError, match="must render in 60 seconds, and takes longer"):
        template.render(MESSAGES, False)


def test_a_program_that_changes_its_working_directory_still_renders(tmp_path: Path) -> None:
    move = f"import os, mlx_impl.text.template as t; os.chdir({str(tmp_path)!r}); "
    assert_succeeds(move + "assert t.ChatTemplate('x', {}).render([], False) == 'x'")


def run_script(code: str, **how: object) -> subprocess.Popen[str]:
    """A user's program, which has no `if __name__ == "__main__"`."""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=-1, stderr=-1, **how)  # type: ignore[call-overload]


def assert_succeeds(code: str) -> None:
    program = run_script(code)
    _, errors = program.communicate(timeout=MAX_SECONDS)
    assert program.returncode == 0, errors


SCRIPT = f"""
import sys, psutil
from mlx_impl.text.template import ChatTemplate
messages = [{{"role": "user", "content": "a"}}]
template = ChatTemplate({"{% if messages %}" + HOSTILE["loops in loops"] + "{% endif %}"!r}, {{}})
print(*[child.pid for child in psutil.Process().children()], flush=True)
"""


@pytest.mark.parametrize(
    "act", mostly_at_night(["template.render(messages, False)", "", "sys.stdin.read()"], 1)
)
@pytest.mark.parametrize("number", mostly_at_night([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], 1))
def test_no_worker_outlives_a_program_that_is_killed(act: str, number: signal.Signals) -> None:
    """Even in the middle of an endless rendering."""
    program = run_script(SCRIPT + act, stdin=subprocess.PIPE, start_new_session=True)
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    time.sleep(0.3)
    os.killpg(program.pid, number) if number is signal.SIGINT else program.send_signal(number)
    _, errors = program.communicate(timeout=MAX_SECONDS)
    deadline = time.monotonic() + MAX_SECONDS
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)
    assert errors.count("Traceback") <= 1 and "template_worker" not in errors


def test_the_worker_imports_no_mlx_and_its_parent_no_jinja2() -> None:
    check = "import sys; sys.exit(any(name.split('.')[0] == {!r} for name in sys.modules))"
    parent = "import mlx_impl.text.template as t; assert t.ChatTemplate('x', {}).render([], False) == 'x'; "
    for code in (
        "import mlx_impl.text.template_worker; " + check.format("mlx"),
        parent + check.format("jinja2"),
    ):
        assert_succeeds(code)


def test_a_template_works_again_after_ctrl_c_in_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% if messages %}" + HOSTILE["loops in loops"] + "{% endif %}x", {})

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(template.process, "check_limits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            template.render(MESSAGES, False)
    assert template.render([], False) == "x"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_starts_its_own_worker() -> None:
    code = """
import os
from mlx_impl.text.template import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}", {})
template.render([{"content": "first"}], False)
if not os.fork():
    assert template.render([{"content": "child"}], False) == "child"
    raise SystemExit
assert os.wait()[1] == 0
assert template.render([{"content": "parent"}], False) == "parent"
"""
    assert_succeeds(code)
