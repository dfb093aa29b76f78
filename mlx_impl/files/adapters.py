"""Adapters in and out, in PEFT's format or mlx-lm's; which of the two, a folder's files say.

A tensor that is missing or has no place is an error here, where PEFT warns and leaves an adapter that does
nothing, and mlx-lm does not look for what is missing.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import mlx.core as mx

from ..config import LoRAConfig
from ..disk.files import one_line
from ..disk.folders import atomic_folder
from ..disk.output_folder import require_no_overlap
from ..lora import add_lora, lora_layers, lora_parameters
from ..model import CausalLM
from ..targets import LINEARS, select_targets
from .checkpoint import LoadedModel, load_model, require_shapes
from .formats import mlx_lm, peft
from .formats.adapter_conversion import to_mlx_lm, to_peft
from .formats.factors import CONFIG, AdapterFile, block_of

FORMATS: dict[str, ModuleType] = {"peft": peft, "mlx-lm": mlx_lm}


def format_of(folder: Path) -> str:
    """The format's name; ValueError where a folder holds adapters of both or of none."""
    found = [name for name, form in FORMATS.items() if (folder / form.FILE).exists()]
    if len(found) != 1:
        files = f"PEFT's {peft.FILE} or mlx-lm's {mlx_lm.FILE}"
        raise ValueError(f"{folder}: must hold {files}, and holds {'both' if found else 'neither'}")
    return found[0]


def save_adapter(
    model: CausalLM, config: LoRAConfig, folder: Path, base_name: str, form: str = "peft"
) -> None:
    """Write both files, each whole or not at all; the folder is made if there is none.

    Raises ValueError where the folder holds an adapter in the other format, whose record this would replace.
    """
    require_format(folder, form)
    adapter = to_file(model, config, base_name)
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[form].write(folder, to_mlx_lm(adapter) if form == "mlx-lm" else adapter)


def require_format(folder: Path, form: str = "peft") -> None:
    for name, other in FORMATS.items():
        if name != form and (folder / other.FILE).exists():
            raise ValueError(
                f"{folder}: holds an adapter in {name}'s format, {other.FILE}: take another folder"
            )


def to_file(model: CausalLM, config: LoRAConfig, base_name: str) -> AdapterFile:
    """PEFT refuses an expression beside a list of layers: for some layers only it becomes the names."""
    num_blocks, targets = len(model.model.layers), config.target_modules
    layers = None
    if config.num_layers not in (-1, num_blocks):
        layers = list(range(num_blocks - config.num_layers, num_blocks))
    record = peft.to_record(config, layers, base_name)
    if layers is not None and isinstance(targets, str):
        record |= {"target_modules": sorted(lora_layers(model)), "layers_to_transform": None}
    return AdapterFile(record, lora_parameters(model))


def load_adapter(model: CausalLM, folder: Path) -> LoRAConfig:
    """Wrap the linears that the adapter targets and load their factors; the configuration it came with.

    Raises ValueError in one sentence, the model untouched, when tensors and configuration do not fit it.
    """
    form = FORMATS[format_of(folder)]
    adapter = form.read(folder)
    require_same_model(model, adapter, folder)
    try:
        if form is mlx_lm:
            require_selected(model, adapter)
            adapter = to_peft(adapter)
        config = peft.to_config(adapter.record, len(model.model.layers))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
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
    require_fit(adapter, expected, form, folder)
    add_lora(model, config)
    ours = [(name, mx.contiguous(array).astype(mx.float32)) for name, array in adapter.tensors.items()]
    model.load_weights(ours, strict=False)
    mx.eval(model.parameters())
    return config


def require_selected(model: CausalLM, adapter: AdapterFile) -> None:
    """ValueError unless the linears with factors are those that mlx-lm would wrap in this model."""
    linears = [name for name, module in model.named_modules() if isinstance(module, LINEARS)]
    wanted = mlx_lm.selected(adapter.record, linears, len(model.model.layers))
    given = {name.rpartition(".")[0] for name in adapter.tensors}
    for linear in sorted(wanted - given):
        raise ValueError(f"the tensor {linear}.lora_a is missing from {mlx_lm.FILE}")
    for linear in sorted(given - wanted):
        raise ValueError(f"num_layers and keys do not name {linear}, of which there are tensors")


def require_same_model(model: CausalLM, adapter: AdapterFile, folder: Path) -> None:
    """ValueError for an adapter of blocks that this model does not have."""
    places = [block_of(name) for name in adapter.tensors]
    last, num_blocks = max((place[0] for place in places if place), default=0), len(model.model.layers)
    if last >= num_blocks:
        raise ValueError(
            f"{folder}: the adapter is for another model: it has factors for layer {last}, "
            f"and the layers of this one are 0 to {num_blocks - 1}"
        )


def require_fit(
    adapter: AdapterFile, expected: dict[str, tuple[int, ...]], form: ModuleType, folder: Path
) -> None:
    """As `require_shapes`, in the names and the orientation of the file."""
    turn = -1 if form is peft else 1
    require_shapes(
        {form.file_name(name): array.T if turn < 0 else array for name, array in adapter.tensors.items()},
        {form.file_name(name): shape[::turn] for name, shape in expected.items()},
        folder / form.FILE,
    )


def convert_adapter(folder: Path, target: Path, to: str) -> str:
    """Write a folder with the same adapter in the other format; the name of the format that it was in.

    Raises ValueError in one sentence, nothing written, for what cannot be converted and brought back.
    """
    require_no_overlap(target, {"adapter": folder})
    source = format_of(folder)
    if source == to:
        raise ValueError(f"{folder}: the adapter is in {to}'s format already")
    try:
        converted = (to_mlx_lm if to == "mlx-lm" else to_peft)(FORMATS[source].read(folder))
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG}: the key {error} is missing") from None
    except ValueError as error:
        names_it = str(error).startswith(str(folder))  # or a file of it
        raise ValueError(str(error) if names_it else f"{folder}: {error}") from None
    with atomic_folder(target) as part:
        for name in (FORMATS[to].FILE, CONFIG):
            part.file(name)
        FORMATS[to].write(part.path, converted)
    return source


def load_with_adapter(
    model: str | Path | None, adapter: Path | None, dequantize: bool = False, dtype: str = "float32"
) -> LoadedModel:
    """The model, with the adapter if there is one."""
    loaded = load_model(model, dequantize, dtype)
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return loaded
