"""`generate --chat` and `--prompts`, and `answer` for programs: the same answers, with the history."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import mlx_impl
from mlx_impl import answer, load_model
from mlx_impl.__main__ import main
from mlx_impl.cli import generate as command
from mlx_impl.cli.prompts_file import read_prompts
from mlx_impl.cli.signals import StoppedBySignal
from tests.tiny_folder import write_folder

FLAGS = ["--max-tokens", "6", "--blas", "off"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model")))


def type_in(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def chat(model: str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The answers, which the tiny model writes in a line each."""
    assert main(["generate", "--model", model, "--chat", *FLAGS, *flags]) == 0
    return capsys.readouterr().out.split("\n")[:-1]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_chat_keeps_its_history_until_it_is_reset(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(model)
    first = answer(loaded, "a", max_tokens=6)
    second = answer(loaded, [user("a"), assistant(first), user("b")], max_tokens=6)
    alone = answer(loaded, "b", max_tokens=6)
    assert second != alone
    type_in("a\n\nb\n/reset\nb\n/quit\nnever\n", monkeypatch)
    shown = "\n".join(chat(model, capsys))
    assert shown == "\n".join([first, second, alone])


def test_the_system_prompt_outlives_a_reset(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(load_model(model), [{"role": "system", "content": "s"}, user("a")], max_tokens=6)
    type_in("a\n/reset\na\n", monkeypatch)
    assert "\n".join(chat(model, capsys, "--system", "s")) == f"{expected}\n{expected}"


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered so far stays in the history; SIGTERM ends the program."""
    real, numbers = command.print_stream, iter([2])

    def stopped(parts: object) -> None:
        real(part for part in [next(iter(parts))])  # type: ignore[call-overload]
        for number in numbers:
            raise StoppedBySignal(number)

    monkeypatch.setattr(command, "print_stream", stopped)
    type_in("a\nb\n", monkeypatch)
    assert main(["generate", "--model", model, "--chat", *FLAGS]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    numbers = iter([15])
    type_in("a\nb\n", monkeypatch)
    assert main(["generate", "--model", model, "--chat", *FLAGS]) == 128 + 15


def test_an_unknown_command_is_no_message(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in("/rest\n/help\n", monkeypatch)
    assert main(["generate", "--model", model, "--chat", *FLAGS]) == 0
    shown = capsys.readouterr()
    assert (
        shown.out == "" and "no such command: /rest" in shown.err and shown.err.count("/reset forgets") == 3
    )


def test_a_chat_needs_a_chat_template_and_prints_no_json(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_folder(tmp_path)
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert main(["generate", "--model", str(base), "--chat", *FLAGS]) == 2
    assert "must have a chat template" in capsys.readouterr().err
    assert main(["generate", "--model", model, "--chat", "--json", *FLAGS]) == 2
    assert "give only one of them" in capsys.readouterr().err


def test_the_prompts_of_a_file_are_answered_one_by_one(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(model)
    expected = [answer(loaded, prompt, max_tokens=6) for prompt in ("one", "two")]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert main(["generate", "--model", model, "--prompts", str(tmp_path / "p.txt"), *FLAGS]) == 0
    assert capsys.readouterr().out == f"> one\n{expected[0]}\n\n> two\n{expected[1]}\n"
    assert main(["generate", "--model", model, "--prompts", str(tmp_path / "p.txt"), "--json", *FLAGS]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [(row["prompt"], row["text"]) for row in answers] == [*zip(("one", "two"), expected, strict=True)]


def test_json_lines_hold_texts_prompts_or_messages(tmp_path: Path) -> None:
    """Of a row of training data the last reply is left out."""
    rows = ["one", {"prompt": "two", "completion": "x"}, {"messages": [user("three"), assistant("x")]}]
    rows += [{"messages": None, "prompt": "four \u2028 \x85 in a line"}]
    path = tmp_path / "p.JSONL"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_prompts(path) == ["one", "two", [user("three")], rows[3]["prompt"]]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "p.txt: must hold at least one prompt, got none"),
        ("p.jsonl", '"a"\n{"a"\n', "p.jsonl:2: must be JSON"),
        ("p.jsonl", '{"text": "a"}', 'p.jsonl:1: must be a text, or have "prompt" or "messages"'),
        ("p.jsonl", '[{"content": "a"}]', 'p.jsonl:1: message 1 must have the texts "role" and "content"'),
        ("p.jsonl", '[{"role": "user", "content": 5}]', "p.jsonl:1: message 1 "),
        ("p.jsonl", "[]", 'p.jsonl:1: must be a text, or have "prompt" or "messages"'),
    ],
)
def test_a_wrong_file_of_prompts_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["generate", "--model", "nowhere", "--prompts", str(tmp_path / name), *FLAGS]) == 2
    (error,) = capsys.readouterr().err.splitlines()[1:]  # after the line on the BLAS
    assert message in error


def test_an_answer_that_was_cut_says_so(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", model, "--prompt", "Hi", *FLAGS]) == 0
    assert "cut after 6 tokens: --max-tokens N allows more" in capsys.readouterr().err


def test_answer_is_generates_answer_and_sampling_follows_from_the_seed(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(model)
    assert main(["generate", "--model", model, "--prompt", "Hi", "--json", *FLAGS]) == 0
    assert answer(loaded, "Hi", max_tokens=6) == json.loads(capsys.readouterr().out)["text"]
    drawn = [answer(loaded, "Hi", 9, temperature=1.5, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    for wrong in ({"max_tokens": 0}, {"seed": -1}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            answer(loaded, "Hi", **wrong)


def test_dir_and_help_show_the_api() -> None:
    """In a notebook `mlx_impl.<Tab>` offers the names for programs, and each says what it is."""
    assert dir(mlx_impl) == sorted([*mlx_impl.__all__, "__version__"])
    for name in mlx_impl.__all__:
        assert name in (mlx_impl.__doc__ or ""), name
        assert (getattr(mlx_impl, name).__doc__ or "").strip(), name


def test_save_adapter_makes_its_folder(model: str, tmp_path: Path) -> None:
    loaded, lora = load_model(model), mlx_impl.LoRAConfig(rank=2)
    mlx_impl.LoRATrainer(loaded.model, lora, mlx_impl.TrainConfig(iters=1))
    mlx_impl.save_adapter(loaded.model, lora, tmp_path / "new" / "folder", loaded.name)
    assert (tmp_path / "new" / "folder" / "adapter_model.safetensors").exists()
