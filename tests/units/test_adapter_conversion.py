"""Convert adapters between PEFT's and mlx-lm's formats: the same update, and every bit back again.

The expected updates are computed here in float64 from the stored arrays.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.__main__ import main
from mlx_impl.config import LoRAConfig
from mlx_impl.files.adapters import convert_adapter, load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.formats.scale_folding import alpha_for
from mlx_impl.lora import add_lora, lora_layers, lora_parameters
from tests.tiny_folder import write_data, write_folder

# Two blocks; every linear has another shape, so that none fits in another's place.
SHAPES = {"self_attn.k_proj": (16, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/name",
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.1,
    "target_modules": ["down_proj", "k_proj", "up_proj"],
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.\w+": 5}},
    "alphas": {"alpha_pattern": {"k_proj": 0.3, "layers.0.mlp.up_proj": 14}},
    "everything": {
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"down_proj": 0.7},
        "lora_alpha": 5.5,
    },
    "expression": {"target_modules": r".*\.(k_proj|mlp\.\w+)"},
}


def rank_and_scale(record: dict[str, Any], linear: str) -> tuple[int, float]:
    """PEFT's rule for the patterns in CASES: the first pattern of the record that matches counts."""
    found = [record["r"], record["lora_alpha"]]
    for number, key in enumerate(("rank_pattern", "alpha_pattern")):
        for pattern, value in record.get(key, {}).items():
            if linear.endswith(pattern) or (pattern.startswith(r"layers\.1") and ".1.mlp." in linear):
                found[number] = value
                break
    rank, alpha = found
    return rank, alpha / (math.sqrt(rank) if record.get("use_rslora") else rank)


def write_peft(folder: Path, record: dict[str, Any], dtype: mx.Dtype = mx.float32) -> Path:
    rng = np.random.default_rng(1)
    tensors = {}
    for block in range(2):
        for path, (num_out, num_in) in SHAPES.items():
            linear = f"model.layers.{block}.{path}"
            rank, _ = rank_and_scale(record, linear)
            name = f"base_model.model.{linear}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, num_in))
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((num_out, rank))
            if record.get("use_dora"):
                tensors[f"{name}.lora_magnitude_vector"] = 1 + rng.random(num_out)
    folder.mkdir(exist_ok=True)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0, :2] = [0.0, -0.0]
    arrays = {name: mx.array(array.astype("f")).astype(dtype) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return folder


def write_mlx_lm(folder: Path, num_blocks: int = 2, **settings: Any) -> Path:
    rng = np.random.default_rng(2)
    settings = {"rank": 3, "scale": 2.3, "dropout": 0.0, **settings}
    tensors = {}
    for block in range(num_blocks):
        for path, (num_out, num_in) in SHAPES.items():
            name = f"model.layers.{block}.{path}"
            tensors[f"{name}.lora_a"] = mx.array(rng.standard_normal((num_in, 3)).astype("f"))
            tensors[f"{name}.lora_b"] = mx.array(rng.standard_normal((3, num_out)).astype("f"))
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    record = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": settings, "iters": 1000}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return folder


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    (file,) = folder.glob("*.safetensors")
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def same_files(one: Path, other: Path) -> bool:
    (record, tensors), (other_record, others) = stored(one), stored(other)
    return (
        record == other_record
        and tensors.keys() == others.keys()
        and all(array.dtype == others[name].dtype for name, array in tensors.items())
        and all(double(a).tobytes() == double(others[name]).tobytes() for name, a in tensors.items())
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_pefts_adapter_is_the_same_function_in_mlx_lms_format(
    tmp_path: Path, change: dict[str, Any], dtype: mx.Dtype
) -> None:
    """scale * A B of every linear, to a relative 2**-44, far below float32's rounding error."""
    source, record = write_peft(tmp_path / "peft", PEFT | change, dtype), PEFT | change
    convert_adapter(source, tmp_path / "mlx", "mlx-lm")
    _, theirs = stored(source)
    written, ours = stored(tmp_path / "mlx")
    settings = written["lora_parameters"]
    assert settings["dropout"] == 0.1
    assert written["fine_tune_type"] == ("dora" if record.get("use_dora") else "lora")
    for name in [name.removesuffix(".lora_a") for name in ours if name.endswith(".lora_a")]:
        _, scale = rank_and_scale(record, name)
        a_IR, b_RO = double(ours[f"{name}.lora_a"]), double(ours[f"{name}.lora_b"])
        assert a_IR.shape[1] == b_RO.shape[0] == settings["rank"]
        a_RI, b_OR = (double(theirs[f"base_model.model.{name}.lora_{f}.weight"]) for f in "AB")
        wanted = scale * (b_OR @ a_RI)
        np.testing.assert_allclose(
            settings["scale"] * (a_IR @ b_RO).T, wanted, rtol=0, atol=2.0**-44 * np.abs(wanted).max()
        )
        if record.get("use_dora"):
            magnitude = theirs[f"base_model.model.{name}.lora_magnitude_vector"]
            assert mx.array_equal(ours[f"{name}.m"], magnitude)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_pefts_adapter_comes_back_to_the_bit(tmp_path: Path, change: dict[str, Any], dtype: mx.Dtype) -> None:
    source = write_peft(tmp_path / "peft", PEFT | change, dtype)
    convert_adapter(source, tmp_path / "mlx", "mlx-lm")
    convert_adapter(tmp_path / "mlx", tmp_path / "back", "peft")
    assert same_files(source, tmp_path / "back")


@pytest.mark.parametrize("scale", [20.0, 2, 2.3, 0.1, 1 / 3, math.pi])
def test_mlx_lms_adapter_comes_back_to_the_bit(tmp_path: Path, scale: float) -> None:
    """With mlx-lm's other settings, although PEFT's record holds only keys that PEFT knows."""
    source = write_mlx_lm(tmp_path / "mlx", scale=scale)
    convert_adapter(source, tmp_path / "peft", "peft")
    record, _ = stored(tmp_path / "peft")
    assert np.float32(record["lora_alpha"] / record["r"]) == np.float32(scale)
    assert "iters" not in json.dumps(record)
    convert_adapter(tmp_path / "peft", tmp_path / "back", "mlx-lm")
    assert same_files(source, tmp_path / "back")


def test_alpha_over_rank_is_the_scale_in_float32_for_every_rank() -> None:
    rng = np.random.default_rng(3)
    for rank in range(1, 257):
        for scale in rng.uniform(1e-3, 100, 20):
            assert np.float32(alpha_for(scale, rank) / rank) == np.float32(scale)


def test_half_precision_is_kept_where_no_scale_is_folded(tmp_path: Path) -> None:
    convert_adapter(write_peft(tmp_path / "peft", PEFT, mx.bfloat16), tmp_path / "mlx", "mlx-lm")
    assert {array.dtype for array in stored(tmp_path / "mlx")[1].values()} == {mx.bfloat16}


def test_the_rank_grows_only_where_float32_cannot_hold_the_product(tmp_path: Path) -> None:
    """The ratio of scales 14 / 7 is a power of two, 0.3 / 7 is not."""
    for alpha, rank in ((14, 3), (0.3, 6)):
        record = PEFT | {"alpha_pattern": {"k_proj": alpha}}
        convert_adapter(write_peft(tmp_path / "peft", record), tmp_path / f"mlx{rank}", "mlx-lm")
        assert stored(tmp_path / f"mlx{rank}")[0]["lora_parameters"]["rank"] == rank


def test_the_original_is_not_restored_after_more_training_in_mlx_lm(tmp_path: Path) -> None:
    """The tensors count then, not the record that the adapter was converted from."""
    change = {"rank_pattern": {"k_proj": 2}}
    convert_adapter(write_peft(tmp_path / "peft", PEFT | change), tmp_path / "mlx", "mlx-lm")
    _, tensors = stored(tmp_path / "mlx")
    name = "model.layers.1.self_attn.k_proj.lora_b"
    mx.save_safetensors(str(tmp_path / "mlx" / "adapters.safetensors"), tensors | {name: tensors[name] + 1})
    convert_adapter(tmp_path / "mlx", tmp_path / "back", "peft")
    record, back = stored(tmp_path / "back")
    assert (record["r"], record["rank_pattern"]) == (4, {})  # k_proj of rank 2 was split into hi and lo
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    assert mx.array_equal(back[key].T, tensors[name] + 1)


@pytest.mark.parametrize("other", [{"r": 3}, {"peft_type": "LORA", "rank_pattern": 3}, {"r": {}}, "text"])
def test_a_kept_record_that_is_damaged_is_ignored(tmp_path: Path, other: Any) -> None:
    source = write_mlx_lm(tmp_path / "mlx")
    record, _ = stored(source)
    (source / "adapter_config.json").write_text(json.dumps(record | {"peft": other}))
    convert_adapter(source, tmp_path / "peft", "peft")
    assert stored(tmp_path / "peft")[0]["r"] == 3


def test_with_a_list_of_layers_the_linears_are_named_one_by_one(tmp_path: Path) -> None:
    """Without the model it is unknown whether it has more layers."""
    record = PEFT | {"layers_to_transform": [0, 1]}
    convert_adapter(write_peft(tmp_path / "peft", record), tmp_path / "mlx", "mlx-lm")
    written, _ = stored(tmp_path / "mlx")
    linears = sorted(f"model.layers.{block}.{path}" for block in range(2) for path in SHAPES)
    assert written["lora_parameters"]["keys"] == linears
    convert_adapter(write_peft(tmp_path / "all", PEFT), tmp_path / "mlx all", "mlx-lm")
    assert stored(tmp_path / "mlx all")[0]["lora_parameters"]["keys"] == sorted(SHAPES)


MLX_NAME = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("tensors", "record", "message"),
    [
        ({f"{MLX_NAME}.lora_b": None}, {}, rf"the tensor {MLX_NAME}\.lora_b is missing"),
        ({f"{MLX_NAME}.lora_c": mx.zeros((2, 2))}, {}, r"k_proj\.lora_c is not part of a LoRA adapter"),
        ({"model.embed_tokens.lora_a": mx.zeros((9, 3))}, {}, "an embedding is not supported"),
        ({f"{MLX_NAME}.lora_a": mx.zeros((2, 3, 32))}, {}, "k_proj.lora_a must have 2 axes"),
        ({f"{MLX_NAME}.lora_a": mx.zeros((32, 4))}, {}, "must have the same rank, got 4 and 3"),
        ({f"{MLX_NAME}.lora_a": mx.full((32, 3), math.nan)}, {}, "k_proj.lora_a' must be finite"),
        (
            {f"{MLX_NAME}.m": mx.zeros((16,))},
            {},
            "must have a tensor m if and only if fine_tune_type is dora",
        ),
        ({}, {"fine_tune_type": "dora"}, "must have a tensor m if and only if fine_tune_type is dora"),
        ({}, {"fine_tune_type": "full"}, "fine_tune_type must be one of lora, dora, got 'full'"),
        ({}, {"num_layers": "4"}, "num_layers must be a whole number, got '4'"),
        ({}, {"lora_parameters": {"rank": 3, "dropout": 0.0}}, "the key 'scale' is missing"),
        ({}, {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0}}, "must have the rank 4, got 3"),
        (
            {},
            {"lora_parameters": {"rank": 3, "scale": 1.0, "dropout": 0.0, "use_bias": True}},
            "lora_parameters may hold dropout, keys, rank, scale, got use_bias",
        ),
        (
            {},
            {"lora_parameters": {"rank": 3, "scale": 1.0, "dropout": 0.0, "keys": "q"}},
            "keys must be a list",
        ),
    ],
)
def test_an_unsupported_file_of_mlx_lm_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, mx.array | None], record: dict[str, Any], message: str
) -> None:
    source = write_mlx_lm(tmp_path / "mlx")
    given, arrays = stored(source)
    changed = {name: array for name, array in {**arrays, **tensors}.items() if array is not None}
    mx.save_safetensors(str(source / "adapters.safetensors"), changed)
    (source / "adapter_config.json").write_text(json.dumps(given | record))
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, "must have the rank 4, got 3"),
        ({"use_dora": True}, "must have a magnitude if and only if use_dora is set"),
        (
            {"target_modules": ["k_proj"]},
            "must name every linear that has factors, and .*down_proj is not named",
        ),
        ({"lora_alpha": None}, "alpha must be a number, got None"),
        ({"bias": "all"}, "bias is not supported and must be off, got 'all'"),
        (
            {"alpha_pattern": {"k_proj": 1e39}},
            "too large for the scale of the other linears|at most 3.4e.38",
        ),
    ],
)
def test_a_record_of_peft_that_contradicts_its_tensors_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = write_peft(tmp_path / "peft", PEFT)
    (source / "adapter_config.json").write_text(json.dumps(PEFT | change))
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, tmp_path / "mlx", "mlx-lm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"]


# ---- in a model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def test_an_mlx_lm_adapter_is_loaded_with_its_own_factors_and_scale(base: Path, tmp_path: Path) -> None:
    source = write_mlx_lm(tmp_path / "mlx", keys=sorted(SHAPES))
    model = load_model(base).model
    config = load_adapter(model, source)
    assert (config.rank, config.target_modules) == (3, tuple(sorted(SHAPES)))
    assert {layer.scale for layer in lora_layers(model).values()} == {2.3}
    _, tensors = stored(source)
    ours = lora_parameters(model)
    assert ours.keys() == tensors.keys()
    assert all(mx.array_equal(ours[name], array) for name, array in tensors.items())


def test_an_adapter_saved_in_mlx_lms_format_loads_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """Its scales are folded when it is saved and unfolded when it is loaded."""
    config = LoRAConfig(rank=3, alpha=5.0, use_rslora=True, rank_pattern={"q_proj": 2}, num_layers=1)
    model, again = load_model(base).model, load_model(base).model
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    add_lora(model, config)
    rng = np.random.default_rng(4)
    drawn = {n: mx.array(rng.standard_normal(a.shape).astype("f")) for n, a in lora_parameters(model).items()}
    model.load_weights(list(drawn.items()), strict=False)
    save_adapter(model, config, tmp_path / "a", "tiny", "mlx-lm")
    loaded = load_adapter(again, tmp_path / "a")
    assert (loaded.rank, loaded.rank_pattern, loaded.num_layers) == (3, {"q_proj": 2}, 1)
    assert all(mx.array_equal(array, drawn[name]) for name, array in lora_parameters(again).items())


@pytest.mark.parametrize(
    ("num_layers", "keys", "message"),
    [
        (16, ["self_attn.k_proj", "mlp.up_proj"], "num_layers and keys do not name .*down_proj"),
        (1, sorted(SHAPES), r"do not name model\.layers\.0\."),
        (16, [*SHAPES, "mlp.gate_proj"], r"gate_proj\.lora_a is missing from adapters\.safetensors"),
        (16, None, r"gate_proj\.lora_a is missing"),
        (16, [*SHAPES, "mlp.experts"], "keys must name linears .*, and mlp.experts is none"),
        (16, [*SHAPES, "model.embed_tokens"], "keys must name linears .*, and model.embed_tokens is none"),
    ],
)
def test_what_mlx_lm_would_ignore_silently_is_an_error(
    base: Path, tmp_path: Path, num_layers: int, keys: list[str] | None, message: str
) -> None:
    source = write_mlx_lm(tmp_path / "mlx", keys=keys)
    record, _ = stored(source)
    (source / "adapter_config.json").write_text(json.dumps(record | {"num_layers": num_layers}))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(base).model, source)


def test_an_adapter_for_a_model_with_more_layers_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is for another model: it has factors for layer 2, .* are 0 to 1"):
        load_adapter(load_model(base).model, write_mlx_lm(tmp_path / "mlx", num_blocks=3))


def test_a_folder_with_adapters_in_both_formats_or_neither_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    write_mlx_lm(write_peft(tmp_path / "both", PEFT))
    for name, word in (("none", "neither"), ("both", "both")):
        with pytest.raises(ValueError, match=f"{name}: must hold PEFT's .* or mlx-lm's .*, and holds {word}"):
            load_adapter(load_model(base).model, tmp_path / name)


def test_an_adapter_in_the_other_format_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    source = write_mlx_lm(tmp_path / "mlx", keys=sorted(SHAPES))
    model = load_model(base).model
    config = load_adapter(model, source)
    with pytest.raises(ValueError, match="holds an adapter in mlx-lm's format"):
        save_adapter(model, config, source, "tiny")
    assert sorted(path.name for path in source.iterdir()) == ["adapter_config.json", "adapters.safetensors"]


# ---- the command


def test_the_command_converts_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_peft(tmp_path / "peft", PEFT), tmp_path / "mlx"
    arguments = ["convert", "--adapter-path", str(source), "--save-path", str(target), "--to", "mlx-lm"]
    assert main([*arguments, "--json"]) == 0
    expected = {"from": "peft", "to": "mlx-lm", "save_path": str(target)}
    assert json.loads(capsys.readouterr().out) == expected
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert main(arguments) == 2
    assert f"{target}: must be a new or an empty folder" in capsys.readouterr().err
    assert main([*arguments[:-1], "peft"]) == 2
    assert "the adapter is in peft's format already" in capsys.readouterr().err


def test_a_run_does_not_start_in_a_folder_with_an_mlx_lm_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_mlx_lm(tmp_path / "mlx")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    arguments = ["--model", str(base), "--data", str(write_data(tmp_path / "data")), "--iters", "1"]
    assert main(["train", *arguments, "--adapter-path", str(source), "--blas", "off"]) == 2
    assert f"{source}: must be new or empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_training_can_start_from_an_mlx_lm_adapter(base: Path, tmp_path: Path) -> None:
    source = write_mlx_lm(tmp_path / "mlx", keys=sorted(SHAPES))
    arguments = ["--model", str(base), "--data", str(write_data(tmp_path / "data")), "--iters", "1"]
    arguments += ["--init-adapter", str(source), "--adapter-path", str(tmp_path / "run"), "--blas", "off"]
    assert main(["train", *arguments]) == 0
    record, tensors = stored_adapter(tmp_path / "run")
    assert (record["r"], len(tensors)) == (3, 12)


def stored_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    record = json.loads((folder / "adapter_config.json").read_text())
    return record, dict(mx.load(str(folder / "adapter_model.safetensors")))
