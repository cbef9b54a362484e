"""The paper's figures drawn from a sweep: gaps between inputs, the hybrid's gain over length, smoothed curves.

Its bars (Figures 2 and 3) are those of dashboards/charts.py. The paper's own numbers are strokes and hollow marks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from dashboards.charts import Scale, element, svg, ticks
from dashboards.comparisons import Measured, difference, measure
from dashboards.curves import Curve, curve, line, percent_tick, smooth, thin
from dashboards.evidence import HELIX_RAW, MAMBA_RAW, Evidence, tokens_of
from dashboards.summary import CellSummary
from dashboards.text import MINUS, count, percent, points
from dashboards.view import CellView
from helix.published import CURVES_IN, PUBLISHED, SMOOTHING, published

#: Of each picture, in pixels; two stand side by side.
WIDTH = 460.0

#: Pixels between two labels at the ends of curves, so that none covers another.
LABEL_STEP = 14.0

#: Letters of a label in the margin; a longer one is cut, and whole in its title.
LABEL_LETTERS = 16


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure: what it is drawn after, its pictures side by side, and what has to be said of them.

    Without pictures the caption says why there is nothing to draw.
    """

    after: str
    svgs: tuple[Markup, ...] = ()
    caption: str


def interaction_gaps(evidence: Evidence, cells: Sequence[CellView], palette: Mapping[str, str]) -> Drawing:
    """The left of Figure 1: how much better raw is than mel, for each backbone of each data set."""
    rows: list[tuple[str, str, Measured, float | None]] = []
    several = len({cell.dataset for cell in cells}) > 1
    for dataset, backbone in dict.fromkeys((cell.dataset, cell.backbone) for cell in cells):
        found = measure(difference(dataset, ("raw", backbone), ("mel", backbone)), evidence)
        if found is not None:
            raw, mel = (published(dataset, frontend, backbone) for frontend in ("raw", "mel"))
            theirs = None if raw is None or mel is None else _minus(raw.accuracy, mel.accuracy)
            rows.append((f"{backbone} on {dataset}" if several else backbone, palette[backbone], found, theirs))
    caption = (
        "Accuracy on raw waveforms minus that on mel spectrograms, in points: right of 0 raw is better. Large dot: "
        "the mean, with its corrected 95 % interval where there is one. Small dots: the single folds (or seeds)."
    )
    if not rows:
        return Drawing(after="Figure 1, left", caption="no backbone has finished both inputs on a shared fold")
    width, left, right, step, top = WIDTH, 110.0, WIDTH - 12.0, 40.0, 12.0
    bottom = top + step * len(rows)
    values = [0.0]
    for _, _, found, theirs in rows:
        values += [
            *found.units.values,
            *(one for one in (found.corrected.low, found.corrected.high, theirs) if one is not None),
        ]
    x = _around_zero(values, left, right)
    drawn = _vertical_grid(x, top, bottom)
    for index, (name, colour, found, theirs) in enumerate(rows):
        y = top + step * (index + 0.5)
        drawn.append(_margin_label(name, left - 12, y + 4))
        drawn += _whisker(x, y, found)
        for value in found.units.values:
            drawn.append(element("circle", cx=x(value), cy=y + 12, r=2.6, class_=f"dot {colour}"))
        mark = element("circle", cx=x(found.mean), cy=y, r=5.0, class_=f"dot mean {colour}")
        mark.append(element("title", f"{name}: {points(found.mean)} points over {found.counted}"))
        drawn.append(mark)
        if theirs is not None:
            stroke = element("path", d=f"M{x(theirs):.1f} {y - 12:.1f}v24", class_="paper-mark")
            stroke.append(element("title", f"the paper: {points(theirs)} points"))
            drawn.append(stroke)
    drawn.append(element("text", "raw minus mel, points", x=right, y=bottom + 32, class_="tick caption end"))
    label = "Raw minus mel in percentage points. " + "; ".join(
        f"{name} {points(found.mean)}" + ("" if theirs is None else f" (the paper {points(theirs)})")
        for name, _, found, theirs in rows
    )
    return Drawing(
        after="Figure 1, left", svgs=(svg(width, bottom + 38, label, drawn, class_="chart"),), caption=caption
    )


def scaling(evidence: Evidence, cells: Sequence[CellView]) -> Drawing:
    """The right of Figure 1: how far HELIX is above Pure Mamba on raw clips of so many tokens."""
    ours: list[tuple[str, int, Measured]] = []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        tokens = next((cell.tokens for cell in cells if (cell.dataset, cell.frontend) == (dataset, "raw")), None)
        found = measure(difference(dataset, HELIX_RAW, MAMBA_RAW), evidence)
        if tokens and found is not None:
            ours.append((dataset, tokens, found))
    theirs = _published_scaling()
    caption = (
        "HELIX minus Pure Mamba on raw waveforms, in points, over the tokens of a clip. Filled: this sweep, with its "
        "corrected 95 % interval where there is one. Hollow: the paper's tables, one data set each, which differ in "
        "more than length. At 3,000 tokens the paper prints no accuracies and calls the advantage 0."
    )
    if not ours:
        return Drawing(after="Figure 1, right", caption="HELIX and Pure Mamba have not both finished raw clips")
    width, left, right, top, bottom = WIDTH, 34.0, WIDTH - 12.0, 14.0, 216.0
    values = [0.0, *(value for _, _, value in theirs)]
    for _, _, found in ours:
        values += [one for one in (found.mean, found.corrected.low, found.corrected.high) if one is not None]
    y = _around_zero(values, bottom, top)
    lengths = [tokens for _, tokens, _ in (*ours, *theirs)]
    low, high = math.floor(math.log10(min(lengths))), math.ceil(math.log10(max(lengths)))
    x = Scale(low, max(high, low + 1), left + 14, right - 14)
    drawn = []
    for tick in _both_ways(y):
        shade = "axis" if tick == 0 else "grid"
        drawn.append(element("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_=shade))
        drawn.append(element("text", _signed(tick), x=left - 6, y=y(tick) + 3.5, class_="tick end"))
    for power in range(low, int(x.high) + 1):
        drawn.append(element("text", count(10**power), x=x(power), y=bottom + 18, class_="tick middle"))
    drawn.append(element("text", "tokens of a clip", x=right, y=bottom + 34, class_="tick caption end"))
    drawn.append(element("text", "points", x=left + 4, y=top + 8, class_="tick caption halo"))
    for dataset, tokens, value in theirs:
        at_x, at_y = x(math.log10(tokens)), y(value)
        mark = element("circle", cx=at_x, cy=at_y, r=5.0, class_="hollow-mark")
        mark.append(element("title", f"the paper, {dataset}: {points(value)} points at {count(tokens)} tokens"))
        drawn += [mark, _beside_mark(dataset, at_x, at_y + 4, right)]
    for dataset, tokens, found in ours:
        at_x = x(math.log10(tokens))
        if found.corrected.low is not None and found.corrected.high is not None:
            low_y, high_y = y(found.corrected.low), y(found.corrected.high)
            path = f"M{at_x:.1f} {low_y:.1f}V{high_y:.1f}M{at_x - 4:.1f} {low_y:.1f}h8M{at_x - 4:.1f} {high_y:.1f}h8"
            drawn.append(element("path", d=path, class_="whisker"))
        mark = element("circle", cx=at_x, cy=y(found.mean), r=5.0, class_="dot mean k1")
        mark.append(
            element("title", f"{dataset}: {points(found.mean)} points at {count(tokens)} tokens, {found.counted}")
        )
        drawn.append(mark)
    label = "HELIX minus Pure Mamba in percentage points by tokens. This sweep: " + "; ".join(
        f"{dataset} {points(found.mean)} at {count(tokens)}" for dataset, tokens, found in ours
    )
    label += ". The paper: " + "; ".join(f"{name} {points(value)} at {count(tokens)}" for name, tokens, value in theirs)
    return Drawing(
        after="Figure 1, right", svgs=(svg(width, bottom + 40, label, drawn, class_="chart"),), caption=caption
    )


def smoothed_curves(
    dataset: str, summaries: Sequence[CellSummary], chance: float | None, palette: Mapping[str, str]
) -> Drawing:
    """Test accuracy over the epochs of one fold, all backbones of a frontend in one panel: Figures 4 to 7.

    A thick line is the moving average over 7 epochs, the thin one under it the raw values, the dotted one its best.
    """
    after = CURVES_IN.get(dataset, "")
    runs = []
    for summary in summaries:
        begun = [trial for trial in summary.cell.trials if trial.state.rows]
        if begun:
            runs.append((summary.cell, min(begun, key=lambda trial: (trial.fold, trial.seed))))
    # one fold and seed for all, so that nothing but the variant differs
    first = min(((trial.fold, trial.seed) for _, trial in runs), default=(0, 0))
    runs = [(cell, trial) for cell, trial in runs if (trial.fold, trial.seed) == first]
    lines = [(cell, found) for cell, trial in runs if (found := curve(trial, "test_accuracy")).epochs]
    if not lines:
        return Drawing(after=after, caption="no epoch has finished yet")
    frontends = list(dict.fromkeys(cell.frontend for cell, _ in lines))
    high = ticks(min(1.02 * max(max(found.values) for _, found in lines), 1.0), 4)
    (fold, seed) = first
    drawings = tuple(
        _smoothed_panel(
            frontend,
            [(cell, found) for cell, found in lines if cell.frontend == frontend],
            high,
            max(cell.epochs for cell, _ in lines),
            chance,
            palette,
            f"fold {fold}, seed {seed}",
        )
        for frontend in frontends
    )
    missing = [one.cell.variant for one in summaries if not any(one.cell is cell for cell, _ in lines)]
    caption = (
        f"Test accuracy in %, fold {fold}, seed {seed}. Thick: moving average over {SMOOTHING} epochs, centred, fewer "
        "at the ends; thin: the raw values under it; dotted: the best of them, which is the number beside the name."
    )
    if missing:
        caption += f" Not begun on this fold: {', '.join(missing)}."
    return Drawing(after=after, svgs=drawings, caption=caption)


def _smoothed_panel(
    frontend: str,
    lines: Sequence[tuple[CellView, Curve]],
    high: Sequence[float],
    epochs: int,
    chance: float | None,
    palette: Mapping[str, str],
    of: str,
) -> Markup:
    """The backbones of one frontend; `high` are the ticks and `epochs` the width of all panels of the figure."""
    left, right, top, bottom = 34.0, WIDTH - 104.0, 26.0, 236.0
    x, y = Scale(min(1.0, epochs - 1.0), float(epochs), left, right), Scale(0.0, high[-1], bottom, top)
    drawn = [element("text", frontend, x=left, y=top - 12, class_="name")]
    for tick in high:
        drawn.append(element("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        drawn.append(element("text", percent_tick(tick), x=left - 6, y=y(tick) + 3.5, class_="tick end"))
    for tick in sorted({1, *(int(tick) for tick in ticks(epochs, 5)[1:] if tick <= epochs), epochs}):
        if tick == epochs or x(tick) < x(epochs) - 24:
            drawn.append(element("text", str(tick), x=x(tick), y=bottom + 17, class_="tick middle"))
    drawn.append(element("text", "epoch", x=right + 12, y=bottom + 17, class_="tick"))
    if chance is not None and chance <= y.high:
        drawn.append(element("line", x1=left, x2=right, y1=y(chance), y2=y(chance), class_="chance"))
    for cell, found in lines:
        drawn += line(thin(found), x, y, f"raw {palette[cell.backbone]}")
    ends = []
    for cell, found in lines:
        colour, best, averaged = palette[cell.backbone], max(found.values), smooth(found, SMOOTHING)
        drawn.append(element("line", x1=left, x2=right, y1=y(best), y2=y(best), class_=f"best {colour}"))
        drawn += line(thin(averaged), x, y, f"mean {colour}")
        ends.append((y(averaged.values[-1]), f"{cell.backbone} {percent(best, 1)}", colour))
    for at, words, colour in _apart(ends):
        drawn.append(_margin_label(words, right + 8, at + 4, anchor=f"label {colour}"))
    label = f"Test accuracy in percent over epochs on {frontend}, {of}. " + "; ".join(
        f"{cell.variant}: best {percent(max(found.values), 1)}, last {percent(found.values[-1], 1)} at epoch "
        f"{found.epochs[-1]}"
        for cell, found in lines
    )
    return svg(WIDTH, bottom + 24, label, drawn, class_="chart")


def _published_scaling() -> list[tuple[str, int, float]]:
    """(data set, raw tokens, HELIX minus Pure Mamba) wherever the paper prints both."""
    found = []
    for dataset in dict.fromkeys(target.dataset for target in PUBLISHED):
        helix, mamba = published(dataset, *HELIX_RAW), published(dataset, *MAMBA_RAW)
        if helix is not None and mamba is not None and (gain := _minus(helix.accuracy, mamba.accuracy)) is not None:
            found.append((dataset, tokens_of(dataset, "raw"), gain))
    return found


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _around_zero(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale on which all values and 0 lie, with air at both ends."""
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or 0.01
    return Scale(low - air if low < 0 else low - air / 2, high + air, start, end)


def _both_ways(scale: Scale) -> list[float]:
    """Round values on both sides of 0 that lie on the scale."""
    step = ticks(max(scale.high - scale.low, 1e-9), 6)[1]
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _signed(value: float) -> str:
    return f"{100 * value:g}".replace("-", MINUS)


def _vertical_grid(x: Scale, top: float, bottom: float) -> list[ElementTree.Element]:
    drawn = []
    for tick in _both_ways(x):
        shade = "axis" if tick == 0 else "grid"
        drawn.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_=shade))
        drawn.append(element("text", _signed(tick), x=x(tick), y=bottom + 17, class_="tick middle"))
    return drawn


def _whisker(x: Scale, y: float, found: Measured) -> list[ElementTree.Element]:
    low, high = found.corrected.low, found.corrected.high
    if low is None or high is None:
        return []
    path = f"M{x(low):.1f} {y:.1f}H{x(high):.1f}M{x(low):.1f} {y - 4:.1f}v8M{x(high):.1f} {y - 4:.1f}v8"
    return [element("path", d=path, class_="whisker")]


def _margin_label(words: str, x: float, y: float, *, anchor: str = "name end") -> ElementTree.Element:
    cut = words if len(words) <= LABEL_LETTERS else f"{words[: LABEL_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    made = element("text", cut, x=x, y=y, class_=anchor)
    if cut != words:
        made.append(element("title", words))
    return made


def _beside_mark(words: str, x: float, y: float, right: float) -> ElementTree.Element:
    """A label to the right of a mark, or to its left where it would leave the drawing."""
    fits = x + 6.5 * len(words) < right
    return element(
        "text", words, x=x + 10 if fits else x - 10, y=y, class_=f"tick halo {'' if fits else 'end'}".strip()
    )


def _apart(labels: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels at their heights, moved down where one would cover another."""
    placed: list[tuple[float, str, str]] = []
    for at, words, colour in sorted(labels):
        placed.append((max(at, placed[-1][0] + LABEL_STEP) if placed else at, words, colour))
    return placed
