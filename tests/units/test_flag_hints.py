"""A wrong flag gets the right hint, and mlx-lm's flags work where they mean the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.parser import command_parsers, make_parser, parse_arguments
from mlx_impl.cli.settings.flag_hints import NOT_NEEDED, SYNONYMS, hint, meant_flag, spelled

COMMANDS = {
    name: [flag for flag in command._option_string_actions if flag.startswith("--")]
    for name, command in command_parsers(make_parser()).items()
}


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", "--lr", "--learning-rate"),
        ("train", "--bs", "--batch-size"),
        ("train", "--wd", "--weight-decay"),
        ("train", "--lora-rank", "--rank"),
        ("train", "--lora_alpha", "--alpha"),
        ("train", "--lora-dropout", "--dropout"),
        ("train", "--r", "--rank"),
        ("train", "--per-device-train-batch-size", "--batch-size"),
        ("train", "--num_train_epochs", "--epochs"),
        ("train", "--max_steps", "--iters"),
        ("train", "--output_dir", "--adapter-path"),
        ("train", "--gradient_checkpointing", "--grad-checkpoint"),
        ("train", "--val-batches", "--eval-examples"),
        ("train", "--resume-adapter-file", "--init-adapter"),
        ("train", "--lerning-rate", "--learning-rate"),
        ("train", "--Rank", "--rank"),
        ("train", "--warm", "--warmup-steps"),
        ("generate", "--max_new_tokens", "--max-tokens"),
        ("generate", "--temp", "--temperature"),
        ("generate", "--adapter", "--adapter-path"),
        ("fuse", "--output-dir", "--save-path"),
        ("train", "--qwertz", None),
    ],
)
def test_the_flag_that_is_meant_is_found(command: str, given: str, meant: str | None) -> None:
    assert meant_flag(given, COMMANDS[command]) == meant


def test_every_synonym_leads_to_a_flag() -> None:
    """One that is not a flag itself, and whose names are spelled as they are compared."""
    all_flags = {spelled(flag) for flags in COMMANDS.values() for flag in flags}
    for word, names in SYNONYMS.items():
        assert word == spelled(word) and set(names) <= all_flags, word
        assert any(word not in map(spelled, flags) for flags in COMMANDS.values()), word
    assert not NOT_NEEDED.keys() & (all_flags | SYNONYMS.keys())


def test_the_hint_is_in_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--lr", "3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: --lr 3; the closest flag is --learning-rate" in error
    assert (
        hint("--trust-remote-code", COMMANDS["train"], "flag") == ": leave it out, no code of a model is run"
    )


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["generate", "--promt", "hi"], "--prompt"),
        (["fuse", "--adapter-path", "x", "--save-dir", "y"], "--save-path"),
        (["convert", "--adapter-path", "x", "--to", "peft", "--out-dir", "y"], "--save-path"),
    ],
)
def test_a_mistyped_flag_that_is_required_gets_its_hint(
    words: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not only that the right one is missing."""
    with pytest.raises(SystemExit):
        main(words)
    assert f"the closest flag is {flag}" in capsys.readouterr().err


# Flags of mlx_lm.lora 0.32.2 with a value, and ours of the same name and meaning.
OF_MLX_LM = [
    *("--model m", "--train", "--data d", "--mask-prompt", "--num-layers 4", "--batch-size 2", "--iters 3"),
    *("--learning-rate 1e-4", "--steps-per-eval 5", "--adapter-path a", "--save-every 6", "--test"),
    *("--grad-accumulation-steps 2", "--max-seq-length 99", "--grad-checkpoint", "--seed 1"),
    *("--optimizer adamw", "--optimizer sgd"),
]


@pytest.mark.parametrize("words", OF_MLX_LM)
def test_a_flag_of_mlx_lm_is_a_flag_here(words: str) -> None:
    flag, *value = words.split()
    given = vars(parse_arguments(["train", *words.split()]))[flag.strip("-").replace("-", "_")]
    assert str(given) == (str(float(value[0])) if flag == "--learning-rate" else value[0]) if value else given


def test_the_short_name_of_the_settings_file_is_mlx_lms(tmp_path: Path) -> None:
    """And its key `train` is no error."""
    (tmp_path / "a.yaml").write_text("iters: 7\ntrain: true\n")
    assert parse_arguments(["train", "-c", str(tmp_path / "a.yaml")]).iters == 7
