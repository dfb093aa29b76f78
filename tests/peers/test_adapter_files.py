"""Adapter files: real PEFT and real mlx-lm load ours, and we load theirs, with the same logits.

The oracle is PEFT in float64 on transformers' model; the tolerance is derived from PEFT's own float32 error
(tests/derived.py). Every B is random, and no matrix but q_proj's is square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.tuner.utils
import mlx_lm.utils
import numpy as np
import peft
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig
from mlx_impl.files.adapters import convert_adapter, load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.fusing import fuse
from mlx_impl.lora import add_lora, lora_parameters
from tests.derived import UNIT_ROUNDOFF, compare, within
from tests.peers.twin import peft_config
from tests.tiny_folder import TOKENS as VOCABULARY
from tests.tiny_folder import write_folder, write_gguf
from tests.units.test_quantized import quantize_folder

TOKENS = np.random.default_rng(3).integers(3, len(VOCABULARY), (3, 7))
LONGEST_SUM = 64  # the widest linear
CONFIGS = {
    "lora": LoRAConfig(rank=3, alpha=7.0),
    "rslora": LoRAConfig(rank=3, alpha=7.0, use_rslora=True),
    "dora": LoRAConfig(rank=3, alpha=7.0, use_dora=True),
    "patterns": LoRAConfig(
        rank=3, alpha=7.0, rank_pattern={"q_proj": 2, r"0\.mlp\.\w+": 5}, alpha_pattern={"v_proj": 3.0}
    ),
    "patterns-dora-rslora": LoRAConfig(
        rank=3, alpha=7.0, use_dora=True, use_rslora=True, rank_pattern={"up_proj": 5}
    ),
    "last-layer": LoRAConfig(rank=2, alpha=5.0, target_modules=("v_proj", "down_proj"), num_layers=1),
    "expression": LoRAConfig(rank=2, alpha=5.0, target_modules=r".*\.0\..*[kv]_proj"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base"))


def random_tensors(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random values of the same shapes; magnitudes, which are lengths, are positive."""
    rng = np.random.default_rng(5)
    drawn = {n: rng.standard_normal(a.shape).astype("f") for n, a in sorted(tensors.items())}
    return {n: np.abs(a) + 0.5 if a.ndim == 1 else 0.3 * a for n, a in drawn.items()}


def write_ours(base: Path, config: LoRAConfig, folder: Path, form: str) -> Path:
    model = load_model(base).model
    add_lora(model, config)
    arrays = random_tensors(lora_parameters(model))
    model.load_weights([(n, mx.array(a)) for n, a in arrays.items()], strict=False)
    folder.mkdir()
    save_adapter(model, config, folder, str(base), form)
    return folder


def write_pefts(base: Path, config: LoRAConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = peft.get_peft_model(hugging_face(base, torch.float32), peft_config(config, 2))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, array in random_tensors(trained).items():
        trained[name].data = torch.tensor(array)
    model.save_pretrained(str(folder))
    return folder


def write_mlx_lms(base: Path, folder: Path, num_layers: int, kind: str = "lora", **settings: Any) -> Path:
    """Write what mlx-lm's trainer writes: the trainable tensors and the record."""
    model, _ = mlx_lm.utils.load_model(base)
    model.freeze()
    settings = {"rank": 3, "scale": 2.3, "dropout": 0.0, **settings}
    mlx_lm.tuner.utils.linear_to_lora_layers(model, num_layers, settings, use_dora=kind == "dora")
    arrays = random_tensors(dict(tree_flatten(model.trainable_parameters())))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), {n: mx.array(a) for n, a in arrays.items()})
    record = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return folder


def hugging_face(base: Path, dtype: torch.dtype) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype).eval()


def pefts_logits(base: Path, folder: Path, dtype: torch.dtype) -> np.ndarray:
    model = peft.PeftModel.from_pretrained(hugging_face(base, dtype), str(folder)).to(dtype).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def mlx_lms_logits(base: Path, folder: Path) -> np.ndarray:
    model, _ = mlx_lm.utils.load_model(base)
    model = mlx_lm.tuner.utils.load_adapters(model, str(folder))
    model.eval()
    return np.array(model(mx.array(TOKENS)))


def our_logits(base: Path, folder: Path) -> np.ndarray:
    model = load_model(base).model
    load_adapter(model, folder)
    return np.array(model.eval()(mx.array(TOKENS)))


def assert_pefts(ours: np.ndarray, base: Path, folder: Path) -> None:
    """The logits `ours` equal those that PEFT computes with the adapter in this folder."""
    ref32, ref64 = (pefts_logits(base, folder, dtype) for dtype in (torch.float32, torch.float64))
    plain = hugging_face(base, torch.float64)(torch.tensor(TOKENS)).logits.detach().numpy()
    assert np.linalg.norm(plain - ref64) > 0.1 * np.linalg.norm(ref64), "the adapter has almost no effect"
    verdict = compare("logits", ours, ref32, ref64, LONGEST_SUM)
    assert verdict.used <= 1, verdict.report


@every_config
def test_peft_loads_what_is_written_here_and_has_its_logits(
    base: Path, tmp_path: Path, config: LoRAConfig, recwarn: pytest.WarningsRecorder
) -> None:
    folder = write_ours(base, config, tmp_path / "adapter", "peft")
    assert_pefts(our_logits(base, folder), base, folder)


@every_config
def test_an_adapter_written_by_peft_is_loaded_and_has_pefts_logits(
    base: Path, tmp_path: Path, config: LoRAConfig
) -> None:
    folder = write_pefts(base, config, tmp_path / "adapter")
    assert_pefts(our_logits(base, folder), base, folder)


@every_config
def test_mlx_lm_loads_what_is_converted_for_it_and_has_pefts_logits(
    base: Path, tmp_path: Path, config: LoRAConfig
) -> None:
    folder = write_pefts(base, config, tmp_path / "adapter")
    convert_adapter(folder, tmp_path / "mlx", "mlx-lm")
    assert_pefts(mlx_lms_logits(base, tmp_path / "mlx"), base, folder)
    assert_pefts(our_logits(base, tmp_path / "mlx"), base, folder)


@every_config
def test_an_adapter_written_by_peft_is_restored_from_mlx_lms_format_bit_for_bit(
    base: Path, tmp_path: Path, config: LoRAConfig
) -> None:
    folder = write_pefts(base, config, tmp_path / "adapter")
    convert_adapter(folder, tmp_path / "mlx", "mlx-lm")
    convert_adapter(tmp_path / "mlx", tmp_path / "back", "peft")
    assert_same_files(folder, tmp_path / "back", "adapter_model.safetensors")


NATIVE = {
    "every-linear": (-1, {}),
    "the-last-layer": (1, {}),
    "more-layers-than-there-are": (16, {"scale": 20.0}),
    "keys": (1, {"keys": ["self_attn.v_proj", "mlp.down_proj"], "rank": 5, "scale": 1.1}),
    "whole-names": (1, {"keys": ["mlp.up_proj", "model.layers.0.self_attn.k_proj"]}),
}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("num_layers", "settings"), NATIVE.values(), ids=NATIVE)
def test_an_adapter_written_by_mlx_lm_has_its_logits_here_and_in_peft(
    base: Path, tmp_path: Path, num_layers: int, settings: dict[str, Any], kind: str
) -> None:
    """And it is restored bit for bit from PEFT's format."""
    folder = write_mlx_lms(base, tmp_path / "adapter", num_layers, kind, **settings)
    convert_adapter(folder, tmp_path / "peft", "peft")
    assert_pefts(mlx_lms_logits(base, folder), base, tmp_path / "peft")
    assert_pefts(our_logits(base, folder), base, tmp_path / "peft")
    assert_pefts(our_logits(base, tmp_path / "peft"), base, tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "back", "mlx-lm")
    assert_same_files(folder, tmp_path / "back", "adapters.safetensors")


def assert_same_files(one: Path, other: Path, tensors: str) -> None:
    records = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)]
    assert records[0] == records[1]
    arrays = [mx.load(str(folder / tensors)) for folder in (one, other)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        assert array.dtype == arrays[1][name].dtype
        assert np.array(array).tobytes() == np.array(arrays[1][name]).tobytes(), name


def test_a_missing_tensor_is_an_error_here_a_warning_in_peft_and_unnoticed_by_mlx_lm(
    base: Path, tmp_path: Path
) -> None:
    folder = write_ours(base, CONFIGS["lora"], tmp_path / "adapter", "peft")
    convert_adapter(folder, tmp_path / "mlx", "mlx-lm")
    for path in (folder / "adapter_model.safetensors", tmp_path / "mlx" / "adapters.safetensors"):
        tensors = dict(mx.load(str(path)))
        mx.eval(tensors)
        name = next(
            name for name in tensors if "1.mlp.up_proj.lora_B" in name or "1.mlp.up_proj.lora_b" in name
        )
        del tensors[name]
        mx.save_safetensors(str(path), tensors)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        pefts_logits(base, folder, torch.float32)
    mlx_lms_logits(base, tmp_path / "mlx")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight is missing"):
        load_adapter(load_model(base).model, folder)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_b is missing"):
        load_adapter(load_model(base).model, tmp_path / "mlx")


def fused_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The logits of transformers and of mlx-lm."""
    with torch.no_grad():
        theirs = hugging_face(folder, torch.float32)(torch.tensor(TOKENS)).logits.numpy()
    return theirs, np.array(mlx_lm.utils.load_model(folder)[0](mx.array(TOKENS)))


@pytest.mark.parametrize("name", ["lora", "dora", "patterns"])
@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_fused_folder_loads_in_transformers_and_mlx_lm_and_has_pefts_logits(
    base: Path, tmp_path: Path, name: str, source: str
) -> None:
    adapter = write_pefts(base, CONFIGS[name], tmp_path / "adapter")
    path = base if source == "folder" else write_gguf(tmp_path / "tiny.gguf")
    survival = fuse(load_model(path), adapter, tmp_path / "fused", dequantize=False)
    assert survival.error < 1e-5
    for logits in fused_logits(tmp_path / "fused"):
        assert_pefts(logits, base, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "fused"))
    ours = load_model(path).tokenizer
    messages = [{"role": "user", "content": "yes, Zoë"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt) == ours.encode_prompt(messages)
    assert mlx_lm.utils.load(str(tmp_path / "fused"))[1].eos_token_ids == {ours.eos_id}


@pytest.mark.parametrize("dequantize", [False, True])
def test_an_adapter_fused_into_a_quantized_base_loads_in_mlx_lm_with_our_logits(
    tmp_path: Path, dequantize: bool
) -> None:
    """If dequantized, it has the logits of base and adapter up to float16's rounding, in transformers too."""
    base = quantize_folder(tmp_path / "base", {"proj": 4, "embed_tokens": 4})
    adapter = write_mlx_lms(base, tmp_path / "adapter", -1)
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize)
    model, config = mlx_lm.utils.load_model(tmp_path / "fused")
    assert ("quantization" in config) is not dequantize
    model.set_dtype(mx.float32)  # otherwise it would compute in float16, as the scales are
    ours = np.array(load_model(tmp_path / "fused").model(mx.array(TOKENS)))
    verdict = within("logits", np.array(model(mx.array(TOKENS))), ours, 0.0, LONGEST_SUM)
    assert verdict.used <= 1, verdict.report
    if dequantize:
        unfused = within("logits", ours, our_logits(base, adapter), 0.0, LONGEST_SUM)
        assert unfused.used <= 2.0**-11 / UNIT_ROUNDOFF, unfused.report  # the weights are float16
        theirs = hugging_face(tmp_path / "fused", torch.float32)(torch.tensor(TOKENS)).logits
        verdict = within("logits", theirs.detach().numpy(), ours, 0.0, LONGEST_SUM)
        assert verdict.used <= 1, verdict.report
