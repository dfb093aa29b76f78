"""Types for what MLX's own stubs of `mlx.core` leave too vague to compute with; pyproject.toml names it.

item, tolist: any number or list, instead of one that may be complex. load: of a safetensors file, without a
choice between three types. custom_function: a decorator that keeps the function's type.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import FunctionContext, MethodContext, Plugin
from mypy.types import AnyType, CallableType, Instance, Type, TypeOfAny, UnionType, get_proper_type


def any_value(context: MethodContext) -> Type:
    return AnyType(TypeOfAny.special_form)


def loaded(context: FunctionContext) -> Type:
    """array | dict | tuple -> the dict, or with `return_metadata` the tuple."""
    union = get_proper_type(context.default_return_type)
    assert isinstance(union, UnionType)
    _, arrays, arrays_and_metadata = union.items
    return arrays_and_metadata if context.arg_types[2] else arrays


def same_function(context: FunctionContext) -> Type:
    """The function's type, with the attributes of a `custom_function` (vjp)."""
    function = get_proper_type(context.arg_types[0][0])
    own = get_proper_type(context.default_return_type)
    if isinstance(function, CallableType) and isinstance(own, Instance):
        return function.copy_modified(fallback=own)
    return own


class MLXPlugin(Plugin):
    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        return any_value if fullname in ("mlx.core.array.item", "mlx.core.array.tolist") else None

    def get_function_hook(self, fullname: str) -> Callable[[FunctionContext], Type] | None:
        hooks = {"mlx.core.load": loaded, "mlx.core.custom_function": same_function}
        return hooks.get(fullname)


def plugin(version: str) -> type[Plugin]:
    return MLXPlugin
