"""The reference equals transformers and PEFT: the same linears, scales, logits and gradients.

They are compared in three ways. In float64, with the float32 steps of transformers and PEFT computed in
float64 too (twin.AllDouble), to 1e-12 relative per tensor in the Frobenius norm: the project's first promise,
kept by its oracle too. In float32, within the derived tolerance. And in float64 as the libraries ship it,
where some steps remain in float32, within the same tolerance.
"""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_impl.config import LoRAConfig, ModelConfig
from reference.lora import add_lora, merge
from reference.model import CausalLM
from tests.derived import assert_within_rounding
from tests.peers.cases import (
    ADAPTERS,
    LLAMA,
    MODELS,
    PLAIN,
    Arrays,
    Oracle,
    longest_sum,
    random_batch,
    random_factors,
    random_weights,
)
from tests.peers.twin import PeftTwin, hugging_face_model, peft_config

PROMISE = 1e-12  # relative, in float64

CASES = [
    *(pytest.param(spec, PLAIN, id=name) for name, spec in MODELS.items()),
    *(pytest.param(LLAMA, lora, id=name) for name, lora in ADAPTERS.items()),
    pytest.param(MODELS["qwen2"], ADAPTERS["dora"], id="qwen2-dora"),
]
both = pytest.mark.parametrize(("spec", "lora"), CASES)


def relative_errors(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {n: float(np.linalg.norm(ours[n] - t) / np.linalg.norm(t)) for n, t in theirs.items()}


def assert_promise(rung: str, ours: Arrays, theirs: Arrays) -> None:
    errors = relative_errors(ours, theirs)
    worst = max(errors, key=errors.__getitem__)
    print(f"{rung}: worst of {len(errors)}: {worst} {errors[worst]:.1e} relative")
    assert errors[worst] <= PROMISE, f"{rung}: {worst} differs by {errors[worst]:.1e} relative"


def logits_and_gradients(
    trainer: type[Oracle] | type[PeftTwin], spec: ModelConfig, lora: LoRAConfig, dtype: torch.dtype
) -> Arrays:
    made = trainer(spec, random_weights(spec), lora, random_factors(spec, lora), dtype)
    batch = random_batch(spec)
    return {"logits": made.logits(batch.inputs_BT), **made.gradients(batch)}


@both
def test_in_float64_logits_and_gradients_equal_pefts_to_1e_12(spec: ModelConfig, lora: LoRAConfig) -> None:
    theirs = logits_and_gradients(PeftTwin, spec, lora, torch.float64)
    ours = logits_and_gradients(Oracle, spec, lora, torch.float64)
    assert len(ours) == 1 + (3 if lora.use_dora else 2) * len(linears_of_peft(spec, lora))
    assert_promise("oracle, float64", ours, theirs)


@both
def test_in_float32_logits_and_gradients_equal_pefts_within_rounding(
    spec: ModelConfig, lora: LoRAConfig
) -> None:
    """PEFT in float32 is at most 8 times as far from the float64 reference as the float32 reference is."""
    theirs = logits_and_gradients(PeftTwin, spec, lora, torch.float32)
    ref32 = logits_and_gradients(Oracle, spec, lora, torch.float32)
    ref64 = logits_and_gradients(Oracle, spec, lora, torch.float64)
    assert_within_rounding("oracle, float32", theirs, ref32, ref64, longest_sum(spec, random_batch(spec)))


def test_float64_as_the_libraries_ship_it_is_within_float32s_rounding() -> None:
    """There RMSNorm, RoPE and the loss stay in float32, so that the error exceeds 1e-12."""
    weights, factors, batch = random_weights(LLAMA), random_factors(LLAMA, PLAIN), random_batch(LLAMA)
    twin = PeftTwin(LLAMA, weights, PLAIN, factors, torch.float64, widened=False)
    theirs = {"logits": twin.logits(batch.inputs_BT), **twin.gradients(batch)}
    ref32 = logits_and_gradients(Oracle, LLAMA, PLAIN, torch.float32)
    ref64 = logits_and_gradients(Oracle, LLAMA, PLAIN, torch.float64)
    assert_within_rounding("oracle, as shipped", theirs, ref32, ref64, longest_sum(LLAMA, batch))
    assert max(relative_errors(ref64, theirs).values()) > PROMISE


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_every_linear_has_pefts_scale(lora: LoRAConfig) -> None:
    weights, factors = random_weights(LLAMA), random_factors(LLAMA, lora)
    assert Oracle(LLAMA, weights, lora, factors).scales() == PeftTwin(LLAMA, weights, lora, factors).scales()


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_merged_weights_equal_pefts_to_1e_12(lora: LoRAConfig) -> None:
    given = LLAMA, random_weights(LLAMA), lora, random_factors(LLAMA, lora)
    ours, theirs = Oracle(*given).model, PeftTwin(*given).model.merge_and_unload()
    merge(ours)
    merged = [{n: w.numpy() for n, w in model.state_dict().items()} for model in (ours, theirs)]
    assert_promise("oracle, merged", *merged)
    changed = {n.removesuffix(".weight") for n, w in given[1].items() if (merged[0][n] != w).all()}
    assert changed == linears_of_peft(LLAMA, lora)


def linears_of_peft(spec: ModelConfig, lora: LoRAConfig) -> set[str]:
    model = peft.get_peft_model(hugging_face_model(spec), peft_config(lora, spec.num_hidden_layers))
    modules = model.base_model.model.named_modules()
    return {name for name, module in modules if isinstance(module, peft.tuners.lora.Linear)}


# Ends of names that match, that match in some blocks only, and that only look as if they matched.
ENDS = st.sampled_from(
    ["q_proj", "self_attn.k_proj", "1.mlp.up_proj", "layers.2.self_attn.v_proj", "_proj", "down", "roj"]
)
EXPRESSIONS = st.sampled_from(
    [r".*\.(q|v)_proj", r"model\.layers\.[12]\.mlp\..*_proj", r".*o_proj", r"q_proj", r".*\.mlp\.(up|down)"]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(ENDS, min_size=1), st.sampled_from([-1, 1, 2, 3]))
def test_name_suffixes_select_the_linears_that_peft_selects(ends: set[str], num_layers: int) -> None:
    lora = LoRAConfig(target_modules=tuple(sorted(ends)), num_layers=num_layers)
    assert_same_linears(lora)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(EXPRESSIONS)
def test_regular_expressions_select_the_linears_that_peft_selects(expression: str) -> None:
    assert_same_linears(LoRAConfig(target_modules=expression))


def assert_same_linears(lora: LoRAConfig) -> None:
    """PEFT refuses a configuration that selects nothing; the reference then returns no names."""
    try:
        theirs = linears_of_peft(LLAMA, lora)
    except ValueError:
        theirs = set()
    assert set(add_lora(CausalLM(LLAMA), lora)) == theirs
