"""`train --config`: a settings file means the same as flags, or is refused in one sentence."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_impl.__main__ import main
from mlx_impl.cli.parser import parse_arguments
from mlx_impl.cli.settings.lora_flags import lora_config
from mlx_impl.config import LoRAConfig
from tests.tiny_folder import write_data, write_folder


def train_with(tmp_path: Path, text: str, *flags: str, suffix: str = ".yaml") -> argparse.Namespace:
    path = tmp_path / f"settings{suffix}"
    path.write_text(text, encoding="utf-8")
    return parse_arguments(["train", "--config", str(path), *flags])


YAML = """
# every kind of value
learning-rate: 1e-5
iters: 30
mask_prompt: no
lr_schedule: cosine
blas: off
data: 2024-01-01
target_modules: [q_proj, v_proj]
rank_pattern: {q_proj: 4, "1.self_attn.v_proj": 2}
"""
TOML = """
learning-rate = 1e-5
iters = 30
mask_prompt = false
lr_schedule = "cosine"
blas = "off"
data = "2024-01-01"
target_modules = ["q_proj", "v_proj"]
[rank_pattern]
q_proj = 4
"1.self_attn.v_proj" = 2
"""


@pytest.mark.parametrize(("text", "suffix"), [(YAML, ".yaml"), (YAML, ".yml"), (TOML, ".toml")])
def test_a_settings_file_gives_the_same_values_as_flags(tmp_path: Path, text: str, suffix: str) -> None:
    """Also where YAML 1.1 would differ: 1e-5 is a number, `off` and a date are strings."""
    flags = "--learning-rate 1e-5 --iters 30 --no-mask-prompt --lr-schedule cosine --blas off "
    flags += "--data 2024-01-01 --target-modules q_proj,v_proj --rank-pattern q_proj=4,1.self_attn.v_proj=2"
    expected = vars(parse_arguments(["train", *flags.split()]))
    got = vars(train_with(tmp_path, text, suffix=suffix))
    assert {**got, "config": None} == expected


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """Also a flag that repeats the default."""
    args = train_with(tmp_path, "rank: 3\nseed: 5\nmask_prompt: false", "--seed", "0", "--mask-prompt")
    assert (args.rank, args.seed, args.mask_prompt) == (3, 0, True)


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("iters: 7", ["--epochs", "2"], {"iters": None, "epochs": 2}),
        ("epochs: 7", ["--iters", "2"], {"iters": 2}),
        ("target_modules: q_proj", ["--target-regex", "x"], {"target_modules": None, "target_regex": "x"}),
        ("targets: all", ["--mask-prompt"], {"targets": None, "mask_prompt": True}),
    ],
)
def test_a_flag_wins_over_a_setting_that_excludes_it(
    tmp_path: Path, text: str, flags: list[str], expected: dict[str, Any]
) -> None:
    """Of two settings that exclude each other the flag counts."""
    args = vars(train_with(tmp_path, text, *flags))
    assert {key: args[key] for key in expected} == expected


# Each list has ten references to the list before: written out, ten thousand million items.
BILLION_LAUGHS = "data:\n- &a0 [x]\n" + "".join(
    f"- &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'; the closest key is learning_rate"),
        ("iter: 1", "unknown key 'iter'; the closest key is iters"),
        ("zzz: 1", "unknown key 'zzz'; keys are the flags without the leading dashes"),
        ("config: a.yaml", "unknown key 'config'"),
        ("help: true", "unknown key 'help'"),
        ("5: 1", "unknown key 5"),
        ("iters: 1.5", "iters must be a whole number, got 1.5"),
        ("iters: true", "iters must be a whole number, got True"),
        ("iters: '5'", "iters must be a whole number, got '5'"),
        ("iters: 010", "iters must be a whole number, got '010'"),
        ("iters:", "iters must be a whole number, got None"),
        ("iters: [3]", "iters must be a whole number, got [3]"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: {a: 1}", "learning_rate must be a number, got {'a': 1}"),
        ("learning_rate: 1" + "0" * 400, "learning_rate must be a number, got 1000"),
        ("iters: 1" + "0" * 9000, "must be YAML"),
        ("mask_prompt: 1", "mask_prompt must be true or false, got 1"),
        ("mask_prompt: maybe", "mask_prompt must be true or false, got 'maybe'"),
        ("json: 1", "json must be true or false, got 1"),
        ("data: 5", "data must be a string, got 5"),
        ("data: [a]", "data must be a string, got ['a']"),
        ("optimizer: adam", "optimizer must be one of adamw, sgd, got 'adam'"),
        (
            "target_modules: [q_proj, 3]",
            "target_modules must be a string or a list of strings, got ['q_proj', 3]",
        ),
        ("target_modules: {q_proj: 3}", "target_modules must be a string or a list of strings"),
        ("rank_pattern: {q_proj: 1.5}", "rank_pattern must be names with whole numbers, got {'q_proj': 1.5}"),
        ("alpha_pattern: {q_proj: x}", "alpha_pattern must be names with numbers, got {'q_proj': 'x'}"),
        ("rank_pattern: [q_proj]", "rank_pattern must be names with whole numbers, got ['q_proj']"),
        ("lora:\n  rank: 3", "unknown key 'lora'"),
        ("iters: 3\nepochs: 3", "iters and epochs exclude each other"),
        ("adapter_path: a\nresume: b", "adapter_path and resume exclude each other"),
        ("iters: 3\niters: 4", "line 2: the key 'iters' is repeated"),
        ("save_every: 3\nsave-every: 4", "the key save_every is repeated"),
        ("iters: [", "must be YAML: line 1"),
        ("- iters", "must hold keys and values, got a list"),
        ("iters: !!python/name:os.system", "must be YAML: line 1"),
        ("a: &a [x]\nb: [*a, *a", "must be YAML"),
        ("[" * 60_000, "must be YAML"),
        (BILLION_LAUGHS, "data must be a string, got [["),
        ("a: \x00", "must be YAML"),
    ],
)
def test_a_wrong_file_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--blas", "off"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1 and len(error) < 500
    assert message in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"iters = ", "must be TOML: "),
        ("a.toml", b"iters = 1\niters = 2", "must be TOML: "),
        ("a.toml", b"x = " + b"[" * 10_000, "must be TOML"),
        ("a.toml", b"iters = 2024-01-01", "iters must be a whole number, got datetime.date(2024, 1, 1)"),
        ("a.toml", b"[lora]\nrank = 3", "unknown key 'lora'"),
        ("a.yaml", b"a: \xff", "must be UTF-8 text"),
        ("a.toml", b"a: \xff", "must be UTF-8 text"),
        ("a.json", b"{}", "the name of a settings file must end in .yaml, .yml or .toml"),
        ("a.yaml", None, "No such file or directory"),
    ],
)
def test_an_unreadable_file_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["train", "--config", str(path), "--blas", "off"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
    assert message in error


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    args = vars(train_with(tmp_path, "# nothing yet\n"))
    assert {**args, "config": None} == vars(parse_arguments(["train"]))


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = write_folder(tmp_path_factory.mktemp("model"))
    return ["--model", str(model), "--data", str(write_data(tmp_path_factory.mktemp("data")))]


@pytest.mark.parametrize(
    "flags",
    [
        ["--iters", "3", "--rank-pattern", "q_proj=3", "--target-modules", "q_proj,v_proj", "--seed", "4"],
        ["--epochs", "1", "--target-regex", r".*\.[qk]_proj", "--no-mask-prompt", "--learning-rate", "1e-5"],
        ["--epochs", "1", "--target-modules", "all-linear", "--use-dora", "--dropout", "0.1"],
    ],
)
def test_config_yaml_of_a_run_repeats_it_bit_exactly(
    common: list[str], tmp_path: Path, flags: list[str]
) -> None:
    """The adapters are equal to the byte, and so are the settings of the second run."""
    first, again = tmp_path / "first", tmp_path / "again"
    train = ["train", "--blas", "off"]
    assert main([*train, *common, *flags, "--rank", "2", "--adapter-path", str(first)]) == 0
    assert main([*train, "--config", str(first / "config.yaml"), "--adapter-path", str(again)]) == 0
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert [(first / n).read_bytes() for n in names] == [(again / n).read_bytes() for n in names]
    ours, theirs = (yaml.safe_load((run / "config.yaml").read_text()) for run in (first, again))
    assert ours == theirs and "adapter_path" not in ours


def test_config_yaml_of_a_run_holds_all_defaults(common: list[str], tmp_path: Path) -> None:
    """Defaults and derived settings are written out."""
    assert main(["train", *common, "--iters", "1", "--seed", "9", "--adapter-path", str(tmp_path / "run"),
                 "--blas", "off"]) == 0  # fmt: skip
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        settings["batch_size"] == 4 and settings["data_seed"] == 9 and settings["rank"] == LoRAConfig().rank
    )
    assert settings["targets"] == "completion" and "mask_prompt" not in settings
    assert "epochs" not in settings and "resume" not in settings and "config" not in settings
    args = train_with(tmp_path, (tmp_path / "run" / "config.yaml").read_text())
    assert lora_config(args) == LoRAConfig()


def test_config_yaml_leaves_the_adapters_settings_to_init_adapter(common: list[str], tmp_path: Path) -> None:
    train = ["train", *common, "--iters", "1", "--blas", "off", "--adapter-path"]
    assert main([*train, str(tmp_path / "a"), "--rank", "3"]) == 0
    assert main([*train, str(tmp_path / "b"), "--init-adapter", str(tmp_path / "a")]) == 0
    settings = ["--config", str(tmp_path / "b" / "config.yaml"), "--adapter-path", str(tmp_path / "c")]
    assert main(["train", *settings, "--blas", "off"]) == 0
    records = [json.loads((tmp_path / run / "adapter_config.json").read_text()) for run in "bc"]
    assert records[0] == records[1] and records[0]["r"] == 3


@pytest.mark.parametrize(
    ("name", "text", "most"),
    [
        ("a.yaml", "[" * 100_000, 65536),
        ("a.yml", "# " + "x" * 2**16, 65536),
        ("a.toml", "a" + ".a" * 2**15 + " = 1", 16384),  # quadratic parsing time: half a minute
    ],
)
def test_a_file_that_would_take_long_to_parse_is_refused_by_its_size(
    tmp_path: Path, name: str, text: str, most: int
) -> None:
    from mlx_impl.cli.settings.config_file import read_config

    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: must have at most {most} bytes, got {len(text)}"):
        read_config(tmp_path / name)


def test_a_named_pipe_is_refused_and_not_opened(tmp_path: Path) -> None:
    from mlx_impl.cli.settings.config_file import read_config

    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"a.yaml: must be a regular file, but is a named pipe"):
        read_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("value", ["./evil.so", "libopenblas.so.0", "Off", ""])
def test_a_settings_file_cannot_name_a_library_to_load(
    tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr("mlx_impl.__main__.load_optimized_blas", loaded.append)
    (tmp_path / "a.yaml").write_text(f"blas: '{value}'")
    assert main(["train", "--config", str(tmp_path / "a.yaml")]) == 2
    assert f"blas must be auto or off in a file, got '{value}': name a library with --blas instead" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert not loaded


@pytest.mark.parametrize("value", ["auto", "off"])
def test_a_settings_file_may_set_blas_to_auto_or_off(tmp_path: Path, value: str) -> None:
    assert train_with(tmp_path, f"blas: {value}").blas == value
    assert train_with(tmp_path, f"blas: {value}", "--blas", "./mine.so").blas == "./mine.so"


def test_config_yaml_does_not_record_the_blas(common: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *common, "--iters", "1", "--adapter-path", str(run), "--blas", "off"]) == 0
    assert "blas" not in yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.parametrize("key", ["data", "adapter_path", "resume", "init_adapter"])
def test_an_empty_path_is_refused(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Path("") would be the current folder."""
    with pytest.raises(ValueError, match=rf"settings.yaml: {key} must name a folder, got an empty text"):
        train_with(tmp_path, f"{key}: ''")
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(SystemExit) as ended:
        main(["train", flag, ""])
    assert ended.value.code == 2
    assert f"argument {flag}: must name a folder, got an empty text" in capsys.readouterr().err


def test_an_empty_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "", "--prompt", "x", "--blas", "off"]) == 2
    assert "a model must be a Hugging Face folder, a .gguf file or a name on the hub, got ''" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_strings_that_look_like_other_yaml_values_stay_strings(tmp_path: Path) -> None:
    from mlx_impl.cli.settings.config_file import read_config, to_yaml

    texts = {
        str(n): text for n, text in enumerate(("off", "1e5", "010", "null", "~", "2024-01-01", "é: #", ""))
    }
    (tmp_path / "a.yaml").write_text(to_yaml(texts), encoding="utf-8")
    assert read_config(tmp_path / "a.yaml") == texts
