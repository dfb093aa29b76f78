"""step.svg: the data flow of one optimizer update on MLX."""

from __future__ import annotations

from .svg import WIDTH, Picture

LEFT, RIGHT = 32, 384  # of the column of code
STATE, END = 464, 768  # of the column of state
MIDDLE = (LEFT + RIGHT) / 2
LANE = 404  # x of the vertical lines between the columns
EVAL = 524  # top of the bar


def box(picture: Picture, y: float, height: float, code: str, *words: str) -> None:
    """A statement of the step, with its explanation."""
    picture.rect(LEFT, y, RIGHT - LEFT, height, tint="blue", stroke="blue")
    picture.text(LEFT + 14, y + 21, code, mono=True, bold=True)
    for row, line in enumerate(words):
        picture.text(LEFT + 14, y + 40 + 17 * row, line, size=12, color="muted")


def state(
    picture: Picture, y: float, height: float, name: str, *words: str, color: str = "purple", inset: float = 0
) -> None:
    """A part of the state; parts of model.state are inset."""
    x = STATE + inset
    picture.rect(x, y, END - inset - x, height, tint=color, stroke=color)
    picture.text(x + 12, y + 21, name, bold=True, mono=not inset)
    for row, line in enumerate(words):
        picture.text(x + 12, y + 39 + 16 * row, line, size=12, color="muted")


def draw_statements(picture: Picture) -> None:
    """The column of code, from the batch to the update."""
    box(picture, 104, 52, "to_arrays(batch)", "NumPy to mx.array: inputs, targets, mask")
    words = (
        "forward: reads W, A and B",
        "backward: gradients of A and B only",
        "returns sum of nats, number of targets, gradients",
    )
    box(picture, 184, 90, "nn.value_and_grad(model, batch_loss)", *words)
    box(picture, 302, 52, "add_up(...)", "sums over the micro-batches of an update")
    box(picture, 380, 52, "mean, clip", "divides once by all targets; clips the global norm")
    box(picture, 458, 52, "optimizer.update(model, gradients)", "AdamW on A and B; W stays")
    picture.line([(MIDDLE, 156), (MIDDLE, 184)], "blue", weight=2, arrow=True)
    for start, end in ((274, 302), (354, 380), (432, 458)):
        picture.line([(MIDDLE, start), (MIDDLE, end)], "orange", weight=2, arrow=True)
    picture.text(MIDDLE + 12, 292, "sums, gradients of A and B", size=12, color="orange")


def draw_state(picture: Picture) -> None:
    """The column of state, which a compiled step must capture."""
    left, right = STATE - 14, END + 8
    picture.rect(left, 80, right - left, 430, stroke="purple", dashed=True, radius=8)
    picture.text(STATE, 101, "mx.compile(f, inputs=state, outputs=state)", size=12, bold=True, color="purple")
    picture.text(STATE, 118, "must capture all three, else it uses old values", size=12, color="purple")
    state(picture, 130, 52, "mx.random.state", "the dropout masks are drawn from it")
    picture.rect(STATE, 194, END - STATE, 202, stroke="purple")
    picture.text(STATE + 12, 215, "model.state", bold=True, mono=True)
    words = ["model.freeze() comes before add_lora()", "no gradient, no optimizer state"]
    state(picture, 226, 68, "frozen weights W", *words, color="muted", inset=12)
    words = ["x W^T + (alpha / rank) (x A) B", "gradients go here, and only here"]
    state(picture, 308, 74, "LoRA factors A, B", *words, color="orange", inset=12)
    words = ["Adam's moments m, v of A and B", "step count", "learning rate"]
    state(picture, 408, 90, "optimizer.state", *words)


def draw_reads_and_writes(picture: Picture) -> None:
    """The lines between the two columns."""
    picture.line([(STATE, 156), (LANE, 156), (LANE, 204), (RIGHT, 204)], "purple", arrow=True)
    picture.line([(STATE + 12, 236), (RIGHT, 236)], "muted", arrow=True)
    picture.text(LANE + 6, 230, "read", size=12, color="muted")
    picture.line([(STATE + 12, 326), (LANE, 326), (LANE, 262), (RIGHT, 262)], "orange", arrow=True)
    picture.text(LANE + 6, 320, "read", size=12, color="orange")
    picture.line([(RIGHT, 472), (LANE, 472), (LANE, 364), (STATE + 12, 364)], "orange", arrow=True)
    picture.text(LANE + 6, 358, "write", size=12, color="orange")
    picture.line([(RIGHT, 488), (STATE, 488)], "purple", arrow=True, arrow_back=True)


def draw_eval(picture: Picture) -> None:
    """The bar at which the graph is computed, and what follows."""
    picture.rect(16, EVAL, WIDTH - 32, 40, fill="blue", radius=8)
    call, words = "mx.eval(state, loss, norm)", "here the whole graph runs"
    picture.text(MIDDLE, EVAL + 26, call, size=15, bold=True, mono=True, color="page", anchor="middle")
    picture.text((STATE + END) / 2, EVAL + 26, words, bold=True, color="page", anchor="middle")
    result = "Then loss.item() and norm.item() are numbers, and the state holds the new A, B, m, v."
    picture.text(LEFT, EVAL + 70, result)
    note = "With several micro-batches, add_up evaluates the sums after each, so one is in memory at a time."
    picture.text(LEFT, EVAL + 94, note, color="muted")


def draw() -> str:
    title = "One optimizer update on MLX"
    picture = Picture(
        EVAL + 120,
        title,
        "to_arrays, nn.value_and_grad (loss and gradients of the LoRA factors A and B), sums over "
        "micro-batches, mean and clipping, optimizer.update: all of this is a lazy graph until mx.eval. "
        "mx.compile must capture model.state, optimizer.state and mx.random.state.",
    )
    picture.heading(title, ["Each call only adds nodes to a graph. mx.eval computes it."])
    picture.rect(16, 66, WIDTH - 32, EVAL - 66, stroke="blue", dashed=True, radius=10)
    picture.text(LEFT, 91, "LAZY GRAPH: nothing is computed yet", size=12, bold=True, color="blue")
    draw_statements(picture)
    draw_state(picture)
    draw_reads_and_writes(picture)
    draw_eval(picture)
    return str(picture)
