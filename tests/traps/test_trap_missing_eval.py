"""Without `mx.eval` nothing runs.

PyTorch runs each line when it is reached. MLX records a graph and runs only what is evaluated. A loop
without `mx.eval` only makes the graph larger; `float(loss)` runs the forward pass but not the update
of the same step; the plan's `mx.eval(model.parameters(), optimizer.state)` leaves the loss
unevaluated. The right form ends each step with `mx.eval(loss, model.parameters(), optimizer.state)`.

The tests count the operations that have not run; they measure no time.
"""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from tests.traps.tiny_lora import Tiny, arrays, batch, loss_fn, pending_ops, tiny_lora

Finish = Callable[[mx.array, Tiny, optim.Optimizer], object]
Waiting = dict[str, list[int]]


def waiting_ops(finish: Finish, steps: int = 4) -> Waiting:
    """Train, and after each step count the operations that loss, model and state still wait for."""
    model, optimizer = tiny_lora(), optim.AdamW(learning_rate=0.1)
    step = nn.value_and_grad(model, loss_fn)
    mx.eval(x_BI := batch())
    counts: Waiting = {"loss": [], "model": [], "step": []}
    for _ in range(steps):
        loss, grads = step(model, x_BI)
        optimizer.update(model, grads)
        finish(loss, model, optimizer)
        counts["loss"].append(pending_ops(loss))
        counts["model"].append(pending_ops(*arrays(model.parameters())))
        counts["step"].append(pending_ops(optimizer.step))
    return counts


def test_wrong_without_eval_the_graph_grows_with_every_step() -> None:
    """Each step adds the same number of operations, more than a hundred, and none of them runs."""
    model = waiting_ops(lambda loss, model, optimizer: None)["model"]
    growth = [after - before for before, after in pairwise(model)]
    assert model[0] > 100
    assert len(set(growth)) == 1
    assert growth[0] > 100


def test_wrong_float_of_the_loss_leaves_the_update_waiting() -> None:
    """Only the loss has run; the backward pass and the update of the last step have not."""
    counts = waiting_ops(lambda loss, model, optimizer: float(loss))
    assert counts["loss"] == [0, 0, 0, 0]
    assert min(counts["model"]) > 100


def test_wrong_nothing_reads_the_step_counter() -> None:
    """Without bias correction or schedule no parameter needs the counter, so its graph grows."""
    assert waiting_ops(lambda loss, model, optimizer: float(loss))["step"] == [1, 2, 3, 4]
    counts = waiting_ops(lambda loss, model, optimizer: mx.eval(loss, model.parameters()))
    assert counts["step"] == [1, 2, 3, 4]
    assert counts["model"] == [0, 0, 0, 0]


def test_wrong_the_plan_leaves_the_end_of_the_loss_waiting() -> None:
    """A gradient does not need the value of the loss, so `float(loss)` later runs a second, small graph."""
    counts = waiting_ops(lambda loss, model, optimizer: mx.eval(model.parameters(), optimizer.state))
    assert counts["model"] == counts["step"] == [0, 0, 0, 0]
    assert min(counts["loss"]) > 0


def test_right_eval_of_loss_parameters_and_state_leaves_nothing() -> None:
    """`mx.eval(loss, model.parameters(), optimizer.state)` at the end of each step."""
    counts = waiting_ops(lambda loss, model, optimizer: mx.eval(loss, model.parameters(), optimizer.state))
    assert counts == {"loss": [0, 0, 0, 0], "model": [0, 0, 0, 0], "step": [0, 0, 0, 0]}
