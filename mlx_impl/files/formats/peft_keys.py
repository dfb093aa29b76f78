"""The keys of PEFT's `adapter_config.json`: read, known to be harmless, or refused with what would do.

Source: PEFT 0.21, `tuners/lora/config.py` and `tuners/lora/layer.py`.
"""

from __future__ import annotations

from typing import Any

from ...disk.files import one_line
from .hf_keys import is_off
from .peft_targets import is_adapted

KNOWN_KEYS = {  # read, or without an effect on what a trained adapter computes
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "auto_mapping"),
    *("qalora_group_size", "megatron_core", "runtime_config"),  # set even where they are not used
    "fan_in_fan_out",  # PEFT sets it to False for linears
    "ensure_weight_tying",  # of modules_to_save, of trained tokens and of adapters outside the blocks
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # init_lora_weights says whether used
    "velora_config",  # how the gradient is computed
}
# What the factors were at the start; the base is as it was. mica, orthogonal and eva begin with B A = 0 too.
INITIALIZATIONS = ("gaussian", "orthogonal", "eva", "mica")
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")

MERGE = "merge it into its base with PEFT's merge_and_unload, and give the merged model as --model"
CONVERT = (
    "it changed the base's weights: save it with PEFT's path_initial_model_for_weight_conversion, which "
    "makes it an adapter of the unchanged base"
)
REMEDIES = {
    "modules_to_save": f"it holds modules that were trained as a whole: {MERGE}",
    "trainable_token_indices": f"it holds trained rows of the embedding: {MERGE}",
    "bias": f"it holds trained biases: {MERGE}",
    "alora_invocation_tokens": "it acts on a part of each text and cannot be merged: use it with PEFT",
    "arrow_config": "it routes between several adapters and cannot be merged: use it with PEFT",
    "peft_type": MERGE,
}


def require_supported(record: dict[str, Any]) -> None:
    """ValueError that names what is not computed here, and says what would do."""
    if record.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be LORA, got {record.get('peft_type')!r}: {MERGE}")
    require_start(record.get("init_lora_weights", True))
    for key in sorted(record.keys() - KNOWN_KEYS - {"init_lora_weights"}):
        value = record[key]
        if not is_off(value) and value != "":
            got = one_line(repr(value))
            raise ValueError(f"{key} is not supported and must be off, got {got}: {REMEDIES.get(key, MERGE)}")
    for outside in ("lm_head", "model.embed_tokens"):
        if is_adapted(outside, record):
            raise ValueError(
                f"an adapter of {outside.removeprefix('model.')} is not supported, and target_modules name "
                f"it: {MERGE}"
            )


def require_start(value: Any) -> None:
    """ValueError unless the adapter began beside an unchanged base."""
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name in INITIALIZATIONS:
        return
    remedy = CONVERT if name.startswith(CONVERTIBLE) else MERGE
    raise ValueError(f"init_lora_weights is not supported, got {one_line(repr(value))}: {remedy}")
