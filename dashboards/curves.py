"""Learning curves as small panels that share their axes: one per variant, folds thin, their mean thick."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from dashboards.charts import Scale, element, svg, ticks
from dashboards.summary import CellSummary
from dashboards.text import GAP, percent
from dashboards.view import CellView, TrialView

#: Points of one curve that a small panel can show; of longer runs the extremes of each stretch are kept.
CURVE_POINTS = 160

#: Panels beyond this many no longer show each other's means: the grey would hide the panel's own curves.
CONTEXT_PANELS = 12

#: The mean stays visible among this many thin lines; more are drawn fainter still.
CROWD = 12


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity over the epochs of one trial, or its mean over trials."""

    epochs: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The learning curves of one cell, drawn; `readout` is what its last common epoch says in words."""

    cell: CellView
    svg: Markup
    colour: str
    readout: str


def curve(trial: TrialView, key: str) -> Curve:
    """The rows of one trial that have a finite number under `key`."""
    rows = [row for row in trial.state.rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return Curve(epochs=tuple(row["epoch"] for row in rows), values=tuple(float(row[key]) for row in rows))


def common_mean(curves: Sequence[Curve]) -> Curve:
    """The mean over the epochs that every started trial has reached: no jump where a fold falls out."""
    started = [dict(zip(one.epochs, one.values, strict=True)) for one in curves if one.epochs]
    if not started:
        return Curve(epochs=(), values=())
    epochs = tuple(sorted(set.intersection(*(set(one) for one in started))))
    return Curve(
        epochs=epochs, values=tuple(math.fsum(one[epoch] for one in started) / len(started) for epoch in epochs)
    )


def thin(values: Curve, points: int = CURVE_POINTS) -> Curve:
    """At most about `points` of a long curve: the lowest and the highest of each stretch, so that no dip vanishes."""
    total = len(values.epochs)
    if total <= points:
        return values
    kept = {0, total - 1}
    stretches = points // 2
    for index in range(stretches):
        stretch = range(index * total // stretches, (index + 1) * total // stretches)
        kept |= {min(stretch, key=values.values.__getitem__), max(stretch, key=values.values.__getitem__)}
    chosen = sorted(kept)
    return Curve(
        epochs=tuple(values.epochs[index] for index in chosen), values=tuple(values.values[index] for index in chosen)
    )


def smooth(values: Curve, window: int) -> Curve:
    """The centred moving average over `window` epochs; near its ends a curve has fewer neighbours to average with.

    The paper says 7 epochs and not how they lie (caption of its Figure 4).
    """
    half = window // 2
    averaged = []
    for index in range(len(values.values)):
        near = values.values[max(index - half, 0) : index + half + 1]
        averaged.append(math.fsum(near) / len(near))
    return Curve(epochs=values.epochs, values=tuple(averaged))


def panels(summaries: Sequence[CellSummary], chance: float | None, palette: dict[str, str]) -> list[Panel]:
    """One panel per cell with a finished epoch: test accuracy above, training loss below, axes shared by all."""
    cells = [summary.cell for summary in summaries if any(trial.state.rows for trial in summary.cell.trials)]
    accuracy = {id(cell): [curve(trial, "test_accuracy") for trial in cell.trials] for cell in cells}
    loss = {id(cell): [curve(trial, "train_loss") for trial in cell.trials] for cell in cells}
    highest = max([chance or 0.0, *(value for cell in cells for one in accuracy[id(cell)] for value in one.values)])
    worst = max([0.0, *(value for cell in cells for one in loss[id(cell)] for value in one.values)])
    axes = (ticks(min(highest * 1.02, 1.0), 4), ticks(worst * 1.02, 3))
    means = {id(cell): thin(common_mean(accuracy[id(cell)])) for cell in cells}
    frontends = list(dict.fromkeys(cell.frontend for cell in cells))
    backbones = list(dict.fromkeys(cell.backbone for cell in cells))
    made = []
    for cell in sorted(cells, key=lambda cell: (frontends.index(cell.frontend), backbones.index(cell.backbone))):
        others = [means[id(other)] for other in cells if other is not cell] if len(cells) <= CONTEXT_PANELS else []
        made.append(_panel(cell, accuracy[id(cell)], loss[id(cell)], others, axes, chance, palette[cell.backbone]))
    return made


def _panel(
    cell: CellView,
    accuracy: Sequence[Curve],
    loss: Sequence[Curve],
    others: Sequence[Curve],
    axes: tuple[list[float], list[float]],
    chance: float | None,
    colour: str,
) -> Panel:
    width, left, right = 336.0, 34.0, 322.0
    above, below = Scale(0.0, axes[0][-1], 142.0, 10.0), Scale(0.0, axes[1][-1], 216.0, 164.0)
    x = Scale(min(1.0, cell.epochs - 1.0), float(cell.epochs), left, right)
    drawn: list[ElementTree.Element] = []
    for scale, marks, form in ((above, axes[0], percent_tick), (below, axes[1], "{:g}".format)):
        for tick in marks:
            drawn.append(element("line", x1=left, x2=right, y1=scale(tick), y2=scale(tick), class_="grid"))
            drawn.append(element("text", form(tick), x=left - 6, y=scale(tick) + 3.5, class_="tick end"))
    for tick in sorted({1, *(int(tick) for tick in ticks(cell.epochs, 4)[1:] if tick <= cell.epochs), cell.epochs}):
        if tick == cell.epochs or x(tick) < x(cell.epochs) - 22:
            drawn.append(element("text", str(tick), x=x(tick), y=232, class_="tick middle"))
    drawn.append(element("text", "test accuracy, %", x=left + 4, y=18, class_="tick caption halo"))
    drawn.append(element("text", "training loss", x=right, y=172, class_="tick caption halo end"))
    if chance is not None and chance <= above.high:
        drawn.append(element("line", x1=left, x2=right, y1=above(chance), y2=above(chance), class_="chance"))
    for other in others:
        drawn.extend(line(other, x, above, "context"))
    crowded = " crowd" if len(cell.trials) > CROWD else ""
    for curves, scale in ((accuracy, above), (loss, below)):
        if sum(1 for one in curves if one.epochs) > 1:
            for one in curves:
                drawn.extend(line(thin(one), x, scale, f"fold {colour}{crowded}"))
        drawn.extend(line(thin(common_mean(curves)), x, scale, f"mean {colour}"))
    for trial, one in zip(cell.trials, accuracy, strict=True):
        if trial.state.status == "failed" and one.epochs:
            end_x, end_y = x(one.epochs[-1]), above(one.values[-1])
            cross = element("path", d=f"M{end_x - 4:.1f} {end_y - 4:.1f}l8 8m0 -8l-8 8", class_="cross")
            cross.append(element("title", f"fold {trial.fold}, seed {trial.seed} failed after epoch {one.epochs[-1]}"))
            drawn.append(cross)
    drawn.append(element("line", x1=left, x2=left, y1=10, y2=216, class_="cursor"))
    mean_accuracy, mean_loss = common_mean(accuracy), common_mean(loss)
    readings = _readings(mean_accuracy, mean_loss, accuracy)
    readout = readings[-1][1] if readings else GAP
    label = f"Learning curves of {cell.variant}: {readout}"
    span = {"data_low": x.low, "data_high": x.high, "data_left": left, "data_right": right}
    spoken = json.dumps(readings, separators=(",", ":"), ensure_ascii=False)
    drawing = svg(width, 238, label, drawn, class_="chart panel-chart", data_readings=spoken, **span)
    return Panel(cell=cell, svg=drawing, colour=colour, readout=readout)


def _readings(accuracy: Curve, loss: Curve, each: Sequence[Curve]) -> list[tuple[int, str]]:
    """(epoch, what to say of it) for the epochs that a reader can point at."""
    losses = dict(zip(loss.epochs, loss.values, strict=True))
    by_trial = [dict(zip(one.epochs, one.values, strict=True)) for one in each if one.epochs]
    said = []
    for epoch, value in zip((shown := thin(accuracy)).epochs, shown.values, strict=True):
        text = f"epoch {epoch}: {percent(value, 1)} %"
        if len(by_trial) > 1:
            spread = [one[epoch] for one in by_trial]
            text += f" ({percent(min(spread), 1)}{GAP}{percent(max(spread), 1)})"
        if epoch in losses:
            text += f", loss {losses[epoch]:.2f}"
        said.append((epoch, text))
    return said


def line(
    values: Curve, x: Callable[[float], float], y: Callable[[float], float], shade: str
) -> list[ElementTree.Element]:
    """A curve; one point alone is a dot, since a line of one point cannot be seen."""
    if not values.epochs:
        return []
    if len(values.epochs) == 1:
        return [element("circle", cx=x(values.epochs[0]), cy=y(values.values[0]), r=2.5, class_=f"lone {shade}")]
    path = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in zip(values.epochs, values.values, strict=True))
    return [element("polyline", points=path, class_=f"line {shade}")]


def percent_tick(value: float) -> str:
    return f"{100 * value:g}"
