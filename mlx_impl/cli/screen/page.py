"""`report.html`: the report of a run as one page without scripts, links or other files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...machine.memory_limits import format_bytes
from ...train import StepRecord
from .answer_tables import answer_sections
from .curve import MIN_SMOOTHED_STEPS, NUM_WINDOWS, finite_points, highest_shown, moving_mean
from .markup import Html, element
from .page_style import STYLE
from .plot import Axes, Curve, plot
from .result import change, duration, number

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser runs and loads nothing


def report_page(report: dict[str, Any], records: Sequence[StepRecord]) -> str:
    """The whole file; `report` is that of run_report.make_report."""
    title, settings = f"LoRA run on {report['model']}", report["run"]["settings"]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", STYLE),
    )
    sections = [
        element("h1", title),
        element("p", f"{report['run']['finished']} \u00b7 {report['run']['folder']}", class_="muted"),
        headline(report),
        section("Loss and learning rate", [loss_plot(report, records), rate_plot(records)]),
        *[section(title, parts) for title, parts in answer_sections(report["answers"])],
        section("Data", table(data_rows(report))),
        section("Model and machine", table(machine_rows(report))),
        section("Settings", table([(key, shown(value)) for key, value in settings.items()])),
        section("Repeat this run", element("pre", report["run"]["repeat"])),
    ]
    body = element("body", element("main", sections))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, content: object) -> Html:
    return element("section", element("h2", title), content)


def table(rows: Sequence[tuple[str, object]]) -> Html:
    cells = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    return element("table", cells, class_="facts")


def shown(setting: object) -> str:
    """Its value as one writes it in a flag."""
    if isinstance(setting, dict):
        return ", ".join(f"{key}={value}" for key, value in setting.items())
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    return ", ".join(map(str, setting)) if isinstance(setting, list) else str(setting)


def headline(report: dict[str, Any]) -> Html:
    """The figures that a reader looks for first."""
    cards = [("training loss", change(report, "loss", ".3f"))]
    if report["valid_loss_first"] is not None:
        cards += [
            ("held-out loss", change(report, "valid_loss", ".3f")),
            ("held-out perplexity", change(report, "valid_perplexity", ".2f")),
            ("best step", f"{report['valid_best_step']} of {report['iters']}"),
        ]
    if "test_loss" in report:
        tested = f"{report['test_loss']:.3f}, perplexity {number(report['test_perplexity'])}"
        cards.append(("test loss", tested))
    for name in report["answers"]:
        if f"{name}_before" in report:
            right = f"{report[f'{name}_before']:.0%} -> {report[f'{name}_after']:.0%}"
            cards.append((f"right answers, {name}", right))
    cards += [
        ("training time", duration(report["training_seconds"])),
        ("peak memory", format_bytes(report["peak_bytes"])),
    ]
    drawn = [element("div", element("dt", name), element("dd", value)) for name, value in cards]
    return element("dl", drawn, class_="cards")


def loss_plot(report: dict[str, Any], records: Sequence[StepRecord]) -> Html:
    """Each step's loss, a moving mean for a long run, and the validation losses."""
    training = finite_points([(record.step, record.loss_nats) for record in records])
    validation = finite_points([(step, loss) for step, loss in report["validation"]])
    curves = [Curve("training", "training, each step's batch", training)]
    if len(training) >= MIN_SMOOTHED_STEPS:
        curves = [Curve("training faint", "training, each step's batch", training), mean_curve(training)]
    if validation:
        best = min(validation, key=lambda point: point[1])
        curves += [
            Curve("validation", "held-out", validation, has_dots=True),
            Curve("best", f"best held-out: {best[1]:.3f} at step {best[0]}", [best], has_dots=True),
        ]
    top = highest_shown([loss for _, loss in training], [loss for _, loss in validation])
    drawn = [curve for curve in curves if curve.points]
    return plot(drawn, axes_of(records, top), "nats per target token, over the steps", 280)


def mean_curve(points: Sequence[tuple[float, float]]) -> Curve:
    import numpy as np

    steps, losses = (np.array(values, float) for values in zip(*points, strict=True))
    width = len(losses) // NUM_WINDOWS
    means = zip(moving_mean(steps, width).tolist(), moving_mean(losses, width).tolist(), strict=True)
    return Curve("training", f"training, mean of {width} steps", list(means))


def rate_plot(records: Sequence[StepRecord]) -> Html:
    rates = [(record.step, record.learning_rate) for record in records]
    top = 1.1 * max(rate for _, rate in rates) or 1.0
    return plot([Curve("rate", "learning rate", rates)], axes_of(records, top), "learning rate", 110)


def axes_of(records: Sequence[StepRecord], top: float) -> Axes:
    return Axes(max(1, records[-1].step), top)


def data_rows(report: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("folder", report["run"]["data"])]
    for kind, what in (("train", "training"), ("valid", "held-out")):
        count, evaluated = report[f"{kind}_examples"], report[f"{kind}_examples_evaluated"]
        rows.append((f"{what} examples", f"{count:,}, of which {evaluated:,} were evaluated"))
    return [*rows, *(("remark", remark) for remark in report["remarks"])]


def machine_rows(report: dict[str, Any]) -> list[tuple[str, object]]:
    trained, base = report["num_trainable"], report["num_parameters"]
    run = report["run"]
    return [
        ("model", f"{report['model']}, {base:,} parameters, frozen"),
        ("adapter", f"{trained:,} trainable parameters, {trained / base:.2%} of the model's"),
        ("device", run["device"]),
        ("machine", run["machine"]),
        ("one step", duration(report["step_seconds_median"])),
        *run["versions"].items(),
    ]
