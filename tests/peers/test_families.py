"""Folders of every family give transformers' logits, LoRA gradients and greedy answers.

Each folder is written by transformers' own class and read twice, by transformers and by `load_model`. The
error against transformers in float64 may be at most 8 times that of transformers in float32, or 8 times
float32's rounding error over the longest sum.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mlx_impl.config import LoRAConfig
from tests.derived import Divergence
from tests.peers.families import (
    FAMILIES,
    SLIDING,
    VOCAB_SIZE,
    Family,
    FolderTwin,
    use_transformers_4_keys,
    write_family,
)
from tests.peers.folder_trainer import (
    Expected,
    assert_equal_to_peft,
    batch_of,
    greedy_answers,
    load,
    logits_and_gradients,
)

PLAIN = LoRAConfig(rank=3, alpha=7.0)
DORA = LoRAConfig(rank=2, alpha=5.0, use_dora=True, use_rslora=True)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
INDEX = "model.safetensors.index.json"
PROMPT_LENGTHS = (19, 3, 7)  # longer than every window but one; shorter; between


@every_family
def test_logits_and_lora_gradients_equal_transformers_and_pefts(tmp_path: Path, family: Family) -> None:
    assert_equal_to_peft(write_family(tmp_path, family), PLAIN)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral-window"])
def test_logits_and_dora_gradients_equal_transformers_and_pefts(tmp_path: Path, name: str) -> None:
    assert_equal_to_peft(write_family(tmp_path, FAMILIES[name]), DORA)


@every_family
def test_twenty_greedy_tokens_equal_transformers(tmp_path: Path, family: Family) -> None:
    """Ours with a key/value cache; both with an adapter; prompts of unequal length, batched and alone."""
    folder = write_family(tmp_path, family)
    twin = FolderTwin(folder, PLAIN, dtype=torch.float32)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]
    theirs = [twin.greedy(prompt, 20) for prompt in prompts]
    assert greedy_answers(load(folder, PLAIN, twin.given), prompts, 20) == (theirs, theirs)
    assert len({tuple(answer) for answer in theirs}) > 1


def test_the_families_meant_to_have_several_shards_have_several(tmp_path: Path) -> None:
    """Otherwise the tests above would prove less than they claim."""
    for number, family in enumerate(FAMILIES.values()):
        folder = write_family(tmp_path / str(number), family)
        num_shards = len(list(folder.glob("*.safetensors")))
        assert (num_shards > 1) == (family.shard_size != "1GB") == (folder / INDEX).exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral-window", {"sliding_window": 5}),
        ("mistral-window", {"sliding_window": 3}),
        ("mistral-window", {"sliding_window": None}),
        ("mistral-window-is-length", {"sliding_window": 12}),
        ("mistral-no-window", {"sliding_window": 4}),
        ("qwen2", SLIDING | {"layer_types": None}),
        ("qwen2-window", {"sliding_window": 4}),
        ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}),
        ("llama2", {"rms_norm_eps": 1e-3}),
    ],
)
def test_the_comparison_fails_for_another_configuration_of_the_same_weights(
    tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    """So each of these keys matters."""
    folder = write_family(tmp_path / "folder", FAMILIES[name])
    twin = FolderTwin(folder, PLAIN)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Divergence):
        assert_equal_to_peft(folder, PLAIN, expected=Expected.of(twin, batch_of(folder)))


@pytest.mark.parametrize("name", ["llama3", "mistral-window", "qwen2", "qwen3"])
def test_the_keys_of_transformers_4_give_the_same_model(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, FAMILIES[name])
    new = logits_and_gradients(load(folder, PLAIN), batch_of(folder))
    use_transformers_4_keys(folder)
    old = logits_and_gradients(load(folder, PLAIN), batch_of(folder))
    assert all((new[key] == old[key]).all() for key in new)
