"""The `generate` command: its output, its inputs and its exit codes."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_impl.__main__ import main
from mlx_impl.files.checkpoint import load_model
from tests.tiny_folder import write_folder

COMMAND = [sys.executable, "-m", "mlx_impl", "generate", "--blas", "off"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model")))


def answer(model: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The text on standard output."""
    given = flags if "--prompt" in flags else ("--prompt", "Hi", *flags)
    assert main(["generate", "--model", model, "--blas", "off", *given]) == 0
    return capsys.readouterr().out


def say(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "3"]])
def test_the_streamed_text_is_the_text_of_json(
    model: str, capsys: pytest.CaptureFixture[str], sampling: list[str]
) -> None:
    streamed = answer(model, capsys, *sampling)
    assert streamed == json.loads(answer(model, capsys, *sampling, "--json"))["text"] + "\n"


def test_the_answer_ends_before_a_stop_token(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With this seed the tiny model ends its turn."""
    flags = ["--temperature", "3", "--max-tokens", "2000", "--seed", "1", "--json"]
    result = json.loads(answer(model, capsys, *flags))
    assert result["finish_reason"] == "stop"
    assert load_model(model).tokenizer.eos_id not in result["tokens"]


def test_the_system_prompt_comes_before_the_users_message(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(answer(model, capsys, "--system", "Be brief.", "--json"))
    turns = ("system\nBe brief.<|im_end|>\n", "user\nHi<|im_end|>\n", "assistant\n")
    expected = "".join(f"<|im_start|>{turn}" for turn in turns)
    assert result["prompt_tokens"] == load_model(model).tokenizer.encode(expected)
    without = json.loads(answer(model, capsys, "--json"))
    assert without["prompt_tokens"] != result["prompt_tokens"]


@pytest.mark.parametrize("text", ["Hé!", "Hé!\n", "Hé!\r\n", "\ufeffHé!\n"])
def test_a_dash_reads_the_prompt_from_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """UTF-8 whatever the locale; the final line break belongs to the shell and is dropped."""
    say(text.encode(), monkeypatch)
    assert json.loads(answer(model, capsys, "--prompt", "-", "--json"))["prompt"] == "Hé!"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "--prompt - reads standard input, which must hold text, got none"),
        (b" \n\n", "--prompt - reads standard input, which must hold text, got none"),
        (b"a\xff", "--prompt - reads standard input, which must be UTF-8 text"),
    ],
)
def test_an_empty_or_undecodable_standard_input_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: bytes, message: str
) -> None:
    """It is raised before the model is looked for."""
    say(text, monkeypatch)
    assert main(["generate", "--model", "nowhere", "--prompt", "-", "--blas", "off"]) == 2
    assert message in capsys.readouterr().err


def test_a_closed_standard_input_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "--prompt", "-", "--blas", "off"]) == 2
    assert "must hold text, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--temperature", "nan"], "temperature must be finite and at least 0, got nan"),
        (["--system", "\udc80"], "--system must be UTF-8 text"),
        (["--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_a_wrong_flag_ends_in_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["generate", "--model", "nowhere", "--prompt", "a", "--blas", "off", *flags]) == 2
    assert message in capsys.readouterr().err


@contextmanager
def under_way(model: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of a very long answer."""
    command = [*COMMAND, "--model", model, "--prompt", "Hi", "--max-tokens", "1000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 60)[0], "nothing within a minute"
            assert os.read(process.stdout.fileno(), 5)
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_the_line_and_exits_130(model: str) -> None:
    with under_way(model) as process:
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.endswith(b"\n") and b"Traceback" not in error


def test_a_closed_pipe_ends_generation_silently_with_141(model: str) -> None:
    """As with `| head -c 5`; 141 is the exit code of a program that SIGPIPE ends."""
    with under_way(model) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 141
    assert error.count(b"\n") <= 1 and b"rror" not in error and b"Broken" not in error
