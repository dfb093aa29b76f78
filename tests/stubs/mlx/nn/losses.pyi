from mlx.core import array

def cross_entropy(
    logits: array, targets: array, weights: array | None = None, axis: int = -1, reduction: str = "none"
) -> array: ...
