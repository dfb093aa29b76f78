"""Save, load and convert adapters, in PEFT's format or mlx-lm's.

A missing or unknown tensor is an error here. PEFT only warns, and the adapter may then do nothing; mlx-lm
does not notice a missing tensor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..config import LoRAConfig
from ..disk.files import atomic_write, one_line
from ..disk.folders import atomic_folder
from ..disk.output_folder import require_no_overlap
from ..lora import add_lora, lora_layers, lora_parameters
from ..model import CausalLM
from ..targets import AnyLinear, linears_of_last_blocks, select_targets
from ..text.template_choice import FILE as TEMPLATE_FILE
from ..text.template_choice import TemplateChoice, template_of_adapter
from .checkpoint import OWN, LoadedModel, load_model, require_shapes
from .formats import mlx_lm, peft
from .formats.adapter_conversion import to_mlx_lm, to_peft
from .formats.factors import CONFIG, AdapterFile, split_block

FORMATS: dict[str, ModuleType] = {"peft": peft, "mlx-lm": mlx_lm}


def adapter_format(folder: Path) -> str:
    """The format's name, told by the files; ValueError if the folder has adapters in both or neither."""
    found = [name for name, form in FORMATS.items() if (folder / form.FILE).exists()]
    if len(found) != 1:
        files = f"PEFT's {peft.FILE} or mlx-lm's {mlx_lm.FILE}"
        if not found and (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder}: must hold {files}; save its pickle adapter_model.bin anew with PEFT")
        raise ValueError(f"{folder}: must hold {files}, and holds {'both' if found else 'neither'}")
    return found[0]


def save_adapter(
    model: CausalLM,
    config: LoRAConfig,
    folder: Path,
    base_name: str,
    form: str = "peft",
    chat_template: str | None = None,
) -> None:
    """Write tensors and configuration, each file atomically; the folder is created if needed.

    `form` is "peft" or "mlx-lm". A chat template that is not the model's own is written beside them. Raises
    ValueError if the folder holds an adapter in the other format, since both formats keep their configuration
    in a file of the same name; and for a configuration that is not that
    of the model's adapter, with which the factors would be another one.
    """
    require_no_other_format(folder, form)
    adapter = to_adapter_file(model, config, base_name)
    if not is_same_adapter(config, model.lora):
        raise ValueError(f"the configuration must be that of the model's adapter, {model.lora}, got {config}")
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[form].write(folder, to_mlx_lm(adapter) if form == "mlx-lm" else adapter)
    if chat_template is not None:
        with atomic_write(folder / TEMPLATE_FILE) as path:
            path.write_bytes(chat_template.encode())


def is_same_adapter(one: LoRAConfig, other: LoRAConfig) -> bool:
    """Equal, with their patterns in the same order: the first that matches decides."""
    are_in_order = all(
        list(ours) == list(theirs)
        for ours, theirs in (
            (one.rank_pattern, other.rank_pattern),
            (one.alpha_pattern, other.alpha_pattern),
        )
    )
    return one == other and are_in_order


def require_no_other_format(folder: Path, form: str) -> None:
    for name, other in FORMATS.items():
        if name != form and (folder / other.FILE).exists():
            raise ValueError(
                f"{folder}: holds an adapter in {name}'s format, {other.FILE}: choose another folder"
            )


def to_adapter_file(model: CausalLM, config: LoRAConfig, base_name: str) -> AdapterFile:
    """The adapter in PEFT's form; names replace an expression for some layers, which PEFT would refuse."""
    num_blocks, targets = len(model.model.layers), config.target_modules
    layers = None
    if config.num_layers not in (-1, num_blocks):
        layers = list(range(num_blocks - config.num_layers, num_blocks))
    record = peft.to_record(config, layers, base_name)
    if layers is not None and isinstance(targets, str):
        record |= {"target_modules": sorted(lora_layers(model)), "layers_to_transform": None}
    return AdapterFile(record, lora_parameters(model))


def load_adapter(model: CausalLM, folder: Path) -> LoRAConfig:
    """Add the adapter in a folder to the model; returns its configuration.

    Raises ValueError, with the model unchanged, if the adapter does not fit it.
    """
    form = FORMATS[adapter_format(folder)]
    adapter = form.read(folder)
    made_for = base_of(adapter.record)
    try:
        require_same_model(model, adapter, folder)
        try:
            if form is mlx_lm:
                require_selected(model, adapter)
                adapter = to_peft(adapter)
            config = peft.to_config(adapter.record, [*linears_of_last_blocks(model, -1)])
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        require_fit(model, adapter, config, form, folder)
    except ValueError as error:
        raise ValueError(f"{error}{made_for}") from None
    add_lora(model, config)
    ours = [(name, mx.contiguous(array).astype(mx.float32)) for name, array in adapter.tensors.items()]
    model.load_weights(ours, strict=False)
    mx.eval(model.parameters())
    return config


def require_fit(
    model: CausalLM, adapter: AdapterFile, config: LoRAConfig, form: ModuleType, folder: Path
) -> None:
    """ValueError unless the factors are those of this configuration in this model."""
    expected: dict[str, tuple[int, ...]] = {}
    try:
        targets = select_targets(model, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {one_line(error)}") from None
    for target in targets:
        expected[f"{target.name}.lora_a"] = (target.num_in, target.rank)
        expected[f"{target.name}.lora_b"] = (target.rank, target.num_out)
        if config.use_dora:
            expected[f"{target.name}.magnitude"] = (target.num_out,)
    require_adapter_shapes(adapter, expected, form, folder)


def base_of(record: dict[str, Any]) -> str:
    """The end of a sentence that names the base model for which the adapter was made, if its record does."""
    base = record.get("base_model_name_or_path") or record.get("model")
    return f"; the adapter was made for {one_line(base)}" if isinstance(base, str) and base else ""


def require_selected(model: CausalLM, adapter: AdapterFile) -> None:
    """ValueError unless the linears that have factors are those that mlx-lm would adapt in this model."""
    linears = [name for name, module in model.named_modules() if isinstance(module, AnyLinear)]
    wanted = mlx_lm.selected_linears(adapter.record, linears, len(model.model.layers))
    given = {name.rpartition(".")[0] for name in adapter.tensors}
    for linear in sorted(wanted - given):
        raise ValueError(f"the tensor {linear}.lora_a is missing from {mlx_lm.FILE}")
    for linear in sorted(given - wanted):
        raise ValueError(f"num_layers and keys do not name {linear}, which has tensors")


def require_same_model(model: CausalLM, adapter: AdapterFile, folder: Path) -> None:
    """ValueError for an adapter of layers that this model does not have."""
    places = [split_block(name) for name in adapter.tensors]
    last, num_blocks = max((place[0] for place in places if place), default=0), len(model.model.layers)
    if last >= num_blocks:
        raise ValueError(
            f"{folder}: the adapter is for another model: it has factors for layer {last}, "
            f"and the layers of this one are 0 to {num_blocks - 1}"
        )


def require_adapter_shapes(
    adapter: AdapterFile, expected: dict[str, tuple[int, ...]], form: ModuleType, folder: Path
) -> None:
    """`require_shapes` with the names and the orientation of the file."""
    order = -1 if form is peft else 1  # PEFT stores transposes
    require_shapes(
        {form.file_name(name): array.T if order < 0 else array for name, array in adapter.tensors.items()},
        {form.file_name(name): shape[::order] for name, shape in expected.items()},
        folder / form.FILE,
    )


def convert_adapter(folder: Path, target: Path, to: str) -> str:
    """Write a folder with the same adapter in the format `to`; returns the name of the old format.

    Raises ValueError, with nothing written, for an adapter that could not be converted back bit for bit.
    """
    require_no_overlap(target, {"adapter": folder})
    source = adapter_format(folder)
    if source == to:
        raise ValueError(f"{folder}: the adapter is in {to}'s format already")
    try:
        converted = (to_mlx_lm if to == "mlx-lm" else to_peft)(FORMATS[source].read(folder))
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG}: the key {error} is missing") from None
    except ValueError as error:
        has_path = str(error).startswith(str(folder))  # the folder's, or a file's in it
        raise ValueError(str(error) if has_path else f"{folder}: {error}") from None
    template = template_of_adapter(folder)
    with atomic_folder(target) as part:
        for name in (FORMATS[to].FILE, CONFIG):
            part.file(name)
        FORMATS[to].write(part.path, converted)
        if template is not None:
            part.file(TEMPLATE_FILE).write_bytes(template.encode())
    return source


def load_with_adapter(
    model: str | Path | None,
    adapter: Path | None,
    dequantize: bool = False,
    dtype: str = "float32",
    template: TemplateChoice = OWN,
) -> LoadedModel:
    """`load_model`, then `load_adapter` if there is an adapter, whose chat template is used if it has one."""
    loaded = load_model(model, dequantize, dtype, replace(template, adapter=adapter))
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return loaded
