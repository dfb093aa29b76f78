"""`mx.compile` freezes all state that it does not capture.

`torch.compile` tracks a module's parameters, its mode and the random state. `mx.compile` records the
function once per shape. Every array, number or flag that is neither an argument nor in `inputs=`
silently keeps its value of that recording, and a change of an array that is not in `outputs=` is
lost. The right form captures `state = [model.state, optimizer.state, mx.random.state]` as
`inputs=state` and `outputs=state`.

On a CPU without a C++ compiler, `mx.compile` records nothing and runs the Python function. None of
these mistakes shows there, and the tests that need the recording are skipped.

The model is one weight matrix of ones, so that every number is exact: the loss is 24 and falls by
3, 4.5, 5.25 under SGD with momentum 0.5.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

X_BI = mx.ones((2, 3))
EXACT = [24.0, 21.0, 16.5, 11.25]
NO_PRIMITIVE = r"^\[eval\] Attempting to eval an array without a primitive\."


@pytest.fixture
def recorded() -> None:
    """Skip where `mx.compile` runs the Python function at every call."""
    calls: list[int] = []

    def count(x: mx.array) -> mx.array:
        calls.append(1)
        return x

    compiled = mx.compile(count)
    compiled(X_BI), compiled(X_BI)
    if len(calls) > 1:
        pytest.skip("mx.compile records nothing here: no C++ compiler, or compilation is off")


def sum_model() -> nn.Linear:
    model = nn.Linear(3, 4, bias=False)
    model.weight = mx.ones((4, 3))
    return model


def sum_loss(model: Any, x_BI: mx.array) -> mx.array:
    return mx.sum(model(x_BI))


class Run:
    """A model, an optimizer, and a training step to be compiled with different captured state."""

    def __init__(self) -> None:
        self.model = sum_model()
        self.optimizer = optim.SGD(learning_rate=0.0625, momentum=0.5)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, self.optimizer.state, mx.random.state]
        mx.eval(self.state)
        self.value_and_grad = nn.value_and_grad(self.model, sum_loss)

    def step(self, x_BI: mx.array) -> mx.array:
        loss, grads = self.value_and_grad(self.model, x_BI)
        self.optimizer.update(self.model, grads)
        return loss


def losses(step: Callable[[mx.array], mx.array]) -> list[float]:
    return [step(X_BI).item() for _ in range(4)]


@pytest.mark.usefixtures("recorded")
def test_wrong_an_uncaptured_model_keeps_its_first_parameters() -> None:
    """The evaluation loss stays 24 although the weights were doubled."""
    model = sum_model()
    compiled = mx.compile(lambda x_BI: sum_loss(model, x_BI))
    assert compiled(X_BI).item() == 24
    model.weight = 2 * model.weight
    assert compiled(X_BI).item() == 24
    assert sum_loss(model, X_BI).item() == 48


@pytest.mark.usefixtures("recorded")
def test_wrong_a_new_shape_hides_the_mistake() -> None:
    """A new batch size is recorded with the current weights; the old size keeps the old weights."""
    model = sum_model()
    compiled = mx.compile(lambda x_BI: sum_loss(model, x_BI))
    assert compiled(X_BI).item() == 24
    model.weight = 2 * model.weight
    assert compiled(mx.ones((1, 3))).item() == 24  # right: 2 for each of 12 weights
    assert compiled(X_BI).item() == 24  # wrong: 48


@pytest.mark.usefixtures("recorded")
def test_wrong_a_step_with_no_capture_repeats_itself_and_breaks_the_model() -> None:
    """The loss never changes, and the model is left with placeholders of the recording."""
    run = Run()
    assert losses(mx.compile(run.step)) == [24, 24, 24, 24]
    with pytest.raises(RuntimeError, match=NO_PRIMITIVE):
        mx.eval(run.model.parameters())


@pytest.mark.usefixtures("recorded")
def test_wrong_inputs_alone_break_the_second_step() -> None:
    """The updated state is not returned, so the next call gets placeholders."""
    run = Run()
    with pytest.raises(RuntimeError, match=NO_PRIMITIVE):
        losses(mx.compile(run.step, inputs=run.state))


@pytest.mark.usefixtures("recorded")
def test_wrong_outputs_alone_repeat_the_first_step() -> None:
    """Each call starts from the first weights again, and the step counter stays at 1."""
    run = Run()
    assert losses(mx.compile(run.step, outputs=run.state)) == [24, 24, 24, 24]
    assert run.optimizer.step.item() == 1


@pytest.mark.usefixtures("recorded")
def test_wrong_an_uncaptured_optimizer_forgets_momentum_and_step_count() -> None:
    """It trains, but like SGD without momentum, 3 per step: momentum stays 0 and the step counter 1."""
    run = Run()
    compiled = mx.compile(run.step, inputs=run.model.state, outputs=run.model.state)
    assert losses(compiled) == [24, 21, 18, 15]
    assert run.optimizer.step.item() == 1


@pytest.mark.usefixtures("recorded")
def test_wrong_uncaptured_randomness_repeats_the_dropout_mask() -> None:
    """Two calls drop the same elements."""
    dropout = nn.Dropout(0.5)
    compiled = mx.compile(lambda x: dropout(x))
    assert mx.array_equal(compiled(mx.ones((8, 8))), compiled(mx.ones((8, 8))))


@pytest.mark.usefixtures("recorded")
def test_wrong_the_mode_of_the_first_call_stays() -> None:
    """`model.train()` sets a Python flag, which is not captured: recorded in eval mode, dropout stays off."""
    dropout = nn.Dropout(0.5).eval()
    state = [dropout.state, mx.random.state]
    compiled = mx.compile(lambda x: dropout(x), inputs=state, outputs=state)
    assert mx.array_equal(compiled(mx.ones((8, 8))), mx.ones((8, 8)))
    dropout.train()
    assert mx.array_equal(compiled(mx.ones((8, 8))), mx.ones((8, 8)))


@pytest.mark.usefixtures("recorded")
def test_wrong_a_python_number_of_the_first_call_stays() -> None:
    """A scale in a Python variable becomes a constant of the recording."""
    settings = {"scale": 1.0}
    compiled = mx.compile(lambda x: settings["scale"] * x)
    assert compiled(mx.array(2.0)).item() == 2
    settings["scale"] = 10.0
    assert compiled(mx.array(2.0)).item() == 2


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("read", [float, mx.eval])
def test_wrong_a_value_cannot_be_read_inside(read: Callable[[mx.array], object]) -> None:
    """Inside the function, `float(loss)` and `mx.eval(loss)` raise, because loss is a placeholder."""
    with pytest.raises(ValueError) as error:
        mx.compile(lambda x: read(mx.sum(x)))(X_BI)
    assert str(error.value) == (
        "[eval] Attempting to eval an array during function transformations "
        "like compile or vmap is not allowed."
    )


def test_right_captured_state_trains_as_the_eager_step_does() -> None:
    """`mx.compile(step, inputs=state, outputs=state)`: the same losses, to the bit."""
    eager, run = Run(), Run()
    assert losses(eager.step) == EXACT
    assert losses(mx.compile(run.step, inputs=run.state, outputs=run.state)) == EXACT
    assert run.optimizer.step.item() == 4


def test_right_captured_state_is_live() -> None:
    """A learning rate that is set between two calls takes effect in the next call."""
    run = Run()
    compiled = mx.compile(run.step, inputs=run.state, outputs=run.state)
    compiled(X_BI)
    run.optimizer.learning_rate = 0.0
    assert losses(compiled) == [21, 21, 21, 21]


def test_right_captured_randomness_moves_on() -> None:
    """With `mx.random.state` in both lists, two calls drop different elements."""
    dropout = nn.Dropout(0.5)
    state = [mx.random.state]
    compiled = mx.compile(lambda x: dropout(x), inputs=state, outputs=state)
    assert not mx.array_equal(compiled(mx.ones((8, 8))), compiled(mx.ones((8, 8))))


def test_right_compile_again_after_a_change_of_mode() -> None:
    """A second `mx.compile`, called in the new mode, has dropout."""
    dropout = nn.Dropout(0.5).eval()
    state = [mx.random.state]
    mx.compile(lambda x: dropout(x), inputs=state, outputs=state)(mx.ones((8, 8)))
    dropout.train()
    compiled = mx.compile(lambda x: dropout(x), inputs=state, outputs=state)
    assert not mx.array_equal(compiled(mx.ones((8, 8))), mx.ones((8, 8)))


def test_right_the_value_is_returned_and_read_outside() -> None:
    """Return the loss, then `float` it."""
    assert float(mx.compile(lambda x: mx.sum(x))(X_BI)) == 6
