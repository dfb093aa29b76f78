"""`--chat-template` and `--template-args`: chosen, saved with the adapter, and the same again afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from mlx_impl.__main__ import main
from mlx_impl.files.checkpoint import load_model, load_tokenizer
from mlx_impl.files.formats.gguf import read_metadata
from mlx_impl.text.template_choice import (
    TemplateChoice,
    as_one,
    find_template,
    parse_arguments,
    with_arguments,
)
from tests.tiny_folder import TEMPLATE, conversation_line, write_data, write_folder, write_gguf

MESSAGES = [{"role": "user", "content": "Hi"}]
SHOUTED = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{% if shout %}!{% endif %}")
TRAIN = ["--iters", "1", "--rank", "2", "--batch-size", "2", "--num-questions", "0", "--blas", "off"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def rendered(tokenizer: Any, tools: Any = None) -> str:
    return str(tokenizer.render(MESSAGES, True, tools))


def test_a_file_replaces_the_models_template(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("<{{ messages[0].content }}>")
    choice = TemplateChoice(str(tmp_path / "own.jinja"))
    assert rendered(load_tokenizer(model, choice)) == "<Hi>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "({{ messages[0].content }})"}))
    assert rendered(load_tokenizer(model, TemplateChoice(str(tmp_path / "chat_template.json")))) == "(Hi)"


NAMED = {"default": "plain", "tool_use": "tools", "rag": "rag {{ tools is none }}"}


@pytest.mark.parametrize("form", ["list", "object", "files"])
def test_a_name_chooses_one_of_the_models_templates_also_for_tools(model: Path, form: str) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in NAMED.items()]
    if form == "object":
        config["chat_template"] = NAMED
    if form == "files":
        config["chat_template"] = None
        (model / "additional_chat_templates").mkdir()
        for name, text in NAMED.items():
            folder = model if name == "default" else model / "additional_chat_templates"
            (folder / f"{'chat_template' if name == 'default' else name}.jinja").write_text(text)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered(load_tokenizer(model), [{"name": "f"}]) == "tools"
    chosen = load_tokenizer(model, TemplateChoice("rag"))
    assert rendered(chosen) == "rag True" and rendered(chosen, [{"name": "f"}]) == "rag False"
    with pytest.raises(ValueError, match=r"one of the model's templates \(.*rag.*\), got 'other'"):
        load_tokenizer(model, TemplateChoice("other"))


def test_the_templates_of_a_gguf_file_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    assert load_tokenizer(path, TemplateChoice("default")).replacement is None

    def with_another(path: Path) -> dict[str, Any]:
        return {**read_metadata(path), "tokenizer.chat_template.rag": "rag"}

    monkeypatch.setattr("mlx_impl.files.checkpoint.read_metadata", with_another)
    assert rendered(load_tokenizer(path, TemplateChoice("rag"))) == "rag"


ARGUMENTS: dict[str, Any] = {
    "shout": True,
    "text": 'a "b" %} }} \n \\ \u2028 é 😀',
    "n": -1.5e-07,
    "deep": {"a": [1, {"b": None}]},
}


def test_arguments_render_as_values_given_to_the_template() -> None:
    """Also in a macro, in a loop and where the template begins with a line break."""
    source = (
        "\n {% macro show() %}{{ text }}{{ shout }}{% endmacro %}{{ show() }}|{{ n }}|{{ deep | tojson }}"
        "{% for m in [1, 2] %}{% if shout %}{{ deep.a[0] }}{% endif %}{% endfor %}"
        "{% if other is defined %}other{% endif %}"
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    given = parse_arguments(json.dumps(ARGUMENTS))
    assert given["deep"] == {"a": [1, {}]}  # null reaches no template
    expected = environment.from_string(source).render(**given)
    assert environment.from_string(with_arguments(source, given)).render() == expected
    assert environment.from_string(with_arguments("{{ n }}", given)).render(n=3) == "3"


def test_null_reaches_no_template(model: Path) -> None:
    choice = TemplateChoice(arguments=parse_arguments('{"x": null}'))
    assert load_tokenizer(model, choice).replacement is None
    (model / "chat_template.jinja").write_text("{{ messages[0] | tojson }}{{ messages[0].x is defined }}")
    tokenizer = load_tokenizer(model)
    assert tokenizer.render([{"role": "user", "x": None, "y": {"z": None}}], True) == (
        '{"role": "user", "y": {}}False'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"must be a JSON object, got \[1\]"),
        ("{", "must be a JSON object: Expecting"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a b": 1}', "names that a template can be given, got 'a b'"),
        ('{"messages": []}', "names that a template can be given, got 'messages'"),
        ('{"not": 1}', "names that a template can be given, got 'not'"),
        ('{"a": "\\ud800"}', "must be valid Unicode"),
    ],
)
def test_what_cannot_be_an_argument_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(text)


def test_two_templates_are_saved_as_one_that_renders_as_both() -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    sources = {"default": "\n  {% if 1 %}\n a {% endif %}\n  \n", "tool_use": " {{ tools }}\n\n"}
    for tools, name in (([1], "tool_use"), (None, "default")):
        expected = environment.from_string(sources[name]).render(tools=tools)
        assert environment.from_string(as_one(sources)).render(tools=tools) == expected


@pytest.fixture
def trained(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a template of its own and an argument."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text(SHOUTED)
    write_data(tmp_path / "data")
    how = ["--chat-template", "own.jinja", "--template-args", '{"shout": true}']
    command = ["train", "--model", str(model), "--data", "data", *TRAIN, "--adapter-path", "run", *how]
    assert main(command) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("arguments", ['{"x": 1e999}', '{"x": [-1e999]}', '{"x": NaN}'])
def test_a_number_that_json_has_not_is_refused(arguments: str) -> None:
    with pytest.raises(ValueError, match="--template-args must be a JSON object: "):
        parse_arguments(arguments)


def test_a_template_in_place_of_its_name_is_refused_in_one_sentence() -> None:
    """Longer than a path may be."""
    with pytest.raises(ValueError, match=r"--chat-template must be a file, or one of .{,2000}$"):
        find_template("{{ messages }}\n" * 999, {})


def prompt_of(model: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    command = ["generate", "--model", str(model), "--prompt", "Hi", "--max-tokens", "1", "--blas", "off"]
    assert main([*command, "--json", *flags]) == 0
    tokens = json.loads(capsys.readouterr().out)["prompt_tokens"]
    return load_tokenizer(model).decode_with_special(tokens)


def test_generate_uses_the_template_of_the_training_unless_it_is_given_another(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def user(text: str) -> str:
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    assert prompt_of(model, capsys) == user("Hi")
    for folder in (trained, trained / "best"):
        assert prompt_of(model, capsys, "--adapter-path", str(folder)) == user("Hi!")
    quiet = ["--adapter-path", str(trained), "--template-args", '{"shout": false}']
    assert prompt_of(model, capsys, *quiet) == user("Hi")
    assert prompt_of(model, capsys, "--adapter-path", str(trained), "--chat-template", "default") == user(
        "Hi"
    )
    assert (
        main(["convert", "--adapter-path", str(trained), "--save-path", "converted", "--to", "mlx-lm"]) == 0
    )
    assert prompt_of(model, capsys, "--adapter-path", "converted") == user("Hi!")
    fuse = ["fuse", "--model", str(model), "--adapter-path", str(trained), "--save-path", "fused"]
    assert main([*fuse, "--blas", "off"]) == 0
    assert prompt_of(tmp_path / "fused", capsys) == user("Hi!")


def test_resume_refuses_another_template(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data have no system message, so both templates make the same tokens of them."""
    settings = json.loads((trained / "manifest.json").read_text())["settings"]
    assert settings["chat_template"] == str(tmp_path / "own.jinja")
    assert settings["template_args"] == '{"shout": true}'
    unfinished = {**json.loads((trained / "manifest.json").read_text()), "finished": None}
    (trained / "manifest.json").write_text(json.dumps(unfinished))
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--blas", "off"]) == 0
    (trained / "manifest.json").write_text(json.dumps({**unfinished, "written": unfinished["written"]}))
    same = "{% if messages[0].role == 'system' %}another{% endif %}" + SHOUTED
    (tmp_path / "own.jinja").write_text(same)
    assert main(["train", "--resume", "run", "--blas", "off"]) == 2
    assert "the chat template must be as in the run to resume" in capsys.readouterr().err


def test_inspect_and_evaluate_render_by_the_chosen_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text(conversation_line("ab", "c") + "\n")
    (tmp_path / "own.jinja").write_text(SHOUTED)
    how = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--chat-template",
        str(tmp_path / "own.jinja"),
        "--json",
    ]
    assert main(["inspect", *how, "--template-args", '{"shout": 1}']) == 0
    assert "ab!<|im_end|>" in json.loads(capsys.readouterr().out)["examples"][0][0][0]
    losses = []
    for arguments in ("{}", '{"shout": 1}'):
        assert main(["evaluate", *how, "--template-args", arguments, "--blas", "off"]) == 0
        losses.append(json.loads(capsys.readouterr().out))
    assert [loss["num_targets"] for loss in losses] == [2, 3]


def test_arguments_need_a_template(model: Path) -> None:
    config = {"eos_token": "<|im_end|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--template-args are for a chat template, and the model has none"):
        load_model(model, template=TemplateChoice(arguments={"a": 1}))
