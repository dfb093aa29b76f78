"""Of mlx.utils, whose own annotations say `list | dict` where only `destination=` gives a dict."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from mlx.core import array

T = TypeVar("T")

@overload
def tree_flatten(
    tree: Any, prefix: str = "", is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, array]]: ...
@overload
def tree_flatten(
    tree: Any,
    prefix: str = "",
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    destination: dict[str, array],
) -> dict[str, array]: ...
def tree_unflatten(tree: Iterable[tuple[str, Any]] | dict[str, Any]) -> Any: ...
def tree_map(
    fn: Callable[..., Any], tree: T, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> T: ...
def tree_map_with_path(
    fn: Callable[..., Any], tree: T, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> T: ...
