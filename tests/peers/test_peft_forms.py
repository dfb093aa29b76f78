"""Adapters that PEFT itself writes with less usual settings are read here, with PEFT's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.peers.test_adapter_files import assert_pefts, hugging_face, our_logits, random_tensors
from tests.tiny_folder import write_folder

NAMES = ["q_proj", "v_proj", "up_proj"]
FORMS: dict[str, dict[str, Any]] = {
    "no task": {"task_type": None},
    "excluded names": {"exclude_modules": ["v_proj", "model.layers.0.mlp.up_proj"]},
    "an excluded expression": {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp.*"},
    "a layer": {"layers_to_transform": 0},
    "all layers in another order": {"layers_to_transform": [1, 0], "layers_pattern": "layers"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 2},
    "eva": {"init_lora_weights": "eva"},
    "a pattern that matches nothing": {"rank_pattern": {"w_pack": 7}, "alpha_pattern": {"nothing": 9}},
    "a name that matches nothing": {"target_modules": ["q_proj", "w_pack"]},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=2)},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_an_adapter_of_pefts_less_usual_settings_has_its_logits_here(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {"r": 3, "lora_alpha": 7, "target_modules": NAMES, "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(0)
    model = peft.get_peft_model(hugging_face(base, torch.float32), peft.LoraConfig(**given))
    factors = {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    for name, array in random_tensors(factors).items():
        factors[name].data = torch.tensor(array)
    model.save_pretrained(str(tmp_path))
    assert_pefts(our_logits(base, tmp_path), base, tmp_path)
