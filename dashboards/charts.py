"""Drawings of the report as SVG, made here: no script is needed to see them, and one style sheet colours them all.

Colours are CSS classes (`k0`, `k1`, ... by backbone), so one drawing serves light, dark and paper. Elements are built
with ElementTree, which escapes every text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from dashboards.summary import CellSummary
from dashboards.text import NOT_FINITE, percent
from dashboards.view import CellView

#: Colours of the style sheet; more backbones than this share colours and are told apart by their labels.
PALETTE = 8

#: The paper's backbones and blocks, whose colours (k0, k1, ...) and marks (b0, b1) are the same on every page.
BACKBONES, BLOCKS = ("mamba", "helix", "attention"), ("mamba", "attention")

#: Marks of blocks in the style sheet: b0 is hollow.
MARKS = 4


def element(tag: str, /, *children: "ElementTree.Element | str", **attributes: Any) -> ElementTree.Element:
    """An element; attribute names are written with "_" for "-", numbers are rounded to a tenth of a pixel."""
    element = ElementTree.Element(tag)
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
            element.set(name.rstrip("_").replace("_", "-"), text)
    for child in children:
        if isinstance(child, str):
            element.text = child
        else:
            element.append(child)
    return element


def svg(
    width: float, height: float, label: str, children: Sequence[ElementTree.Element], /, **attributes: Any
) -> Markup:
    box = f"0 0 {width:g} {height:g}"
    root = element("svg", viewBox=box, role="img", aria_label=label, **attributes)
    root.extend(children)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(high: float, wanted: int) -> list[float]:
    """Round numbers from 0 to the first that is not below `high`, about `wanted` steps of 1, 2 or 5 times ten^k."""
    if high <= 0:
        return [0.0, 1.0]
    rough = high / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * index, 10) for index in range(math.ceil(high / step - 1e-9) + 1)]


def colours(cells: Sequence[CellView]) -> dict[str, str]:
    """The colour class of each backbone: by its name for the paper's, the rest of the palette for the others."""
    here = list(dict.fromkeys(cell.backbone for cell in cells))
    found = {name: f"k{index}" for index, name in enumerate(BACKBONES) if name in here}
    others = [name for name in here if name not in BACKBONES]
    rest = PALETTE - len(BACKBONES)
    return {**found, **{name: f"k{len(BACKBONES) + index % rest}" for index, name in enumerate(others)}}


def block_marks(patterns: Iterable[Sequence[str]]) -> dict[str, str]:
    """The class of each kind of block: hollow for mamba, filled for attention, the other two shared by the rest."""
    here = list(dict.fromkeys(block for pattern in patterns for block in pattern))
    found = {name: f"b{index}" for index, name in enumerate(BLOCKS) if name in here}
    others = [name for name in here if name not in BLOCKS]
    rest = MARKS - len(BLOCKS)
    return {**found, **{name: f"b{len(BLOCKS) + index % rest}" for index, name in enumerate(others)}}


def glyph(pattern: Sequence[str], marks: Mapping[str, str]) -> Markup:
    """A pattern as a row of squares, one per layer, with the `block_marks` of their kinds."""
    squares = []
    for index, block in enumerate(pattern):
        square = element("rect", x=index * 9 + 1, y=1, width=7, height=7, class_=f"block {marks[block]}")
        square.append(element("title", f"layer {index}: {block}"))
        squares.append(square)
    width = len(pattern) * 9
    return svg(width, 9, "layers: " + ", ".join(pattern), squares, class_="glyph", width=width, height=9)


def bars(summaries: Sequence[CellSummary], select: str, chance: float | None, palette: dict[str, str]) -> Markup:
    """One bar per cell: mean and spread, a dot per trial, a stroke for the paper's number, a line for guessing."""
    width, left, right, row, top = 1000.0, 150.0, 880.0, 42.0, 20.0
    bottom = top + row * len(summaries)
    largest = [chance or 0.0]
    for summary in summaries:
        largest += [sample.accuracy.get(select, 0.0) for sample in summary.samples]
        largest.append((summary.selected.mean or 0.0) + (summary.selected.std or 0.0))
        if summary.comparison is not None:
            largest.append(summary.comparison.theirs or 0.0)
    marks = [tick for tick in ticks(max(largest) * 1.02, 6) if tick <= 1.0]
    if marks[-1] < max(largest) * 1.02:
        marks.append(1.0)
    x = Scale(0.0, marks[-1], left, right)
    drawn = []
    for tick in marks:
        drawn.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        label = f"{100 * tick:g}" + (" %" if tick == marks[-1] else "")
        drawn.append(element("text", label, x=x(tick), y=bottom + 18, class_="tick middle"))
    for index, summary in enumerate(summaries):
        drawn.extend(_bar(summary, select, x, top + row * (index + 0.5), palette[summary.cell.backbone]))
    if chance is not None:
        drawn.append(element("line", x1=x(chance), x2=x(chance), y1=top - 14, y2=bottom, class_="chance"))
        drawn.append(element("text", "guessing", x=x(chance) + 5, y=top - 6, class_="tick"))
    label = "Accuracy in percent per variant. " + "; ".join(
        f"{summary.cell.variant} {summary.selected.percent_std}" for summary in summaries
    )
    return svg(width, bottom + 26, label, drawn, class_="chart bars")


def _bar(summary: CellSummary, select: str, x: Scale, y: float, colour: str) -> list[ElementTree.Element]:
    cell, selected = summary.cell, summary.selected
    drawn = [element("text", cell.variant, x=x.start - 12, y=y - 1, class_="name end")]
    if selected.mean is None:
        drawn.append(
            element(
                "text",
                NOT_FINITE if selected.not_finite else summary.why_none,
                x=x.start + 8,
                y=y - 1,
                class_="tick halo",
            )
        )
    else:
        size = {"x": x.start, "y": y - 15, "width": x(selected.mean) - x.start, "height": 20}
        drawn.append(element("rect", class_=f"bar {colour}", **size))
        if cell.frontend != "raw":
            drawn.append(element("rect", class_="hatched", **size))
    if selected.mean is not None and selected.std is not None:
        low, high = x(max(selected.mean - selected.std, 0.0)), x(selected.mean + selected.std)
        drawn.append(
            element(
                "path",
                d=f"M{low:.1f} {y - 5:.1f}H{high:.1f}M{low:.1f} {y - 9:.1f}v8M{high:.1f} {y - 9:.1f}v8",
                class_="whisker",
            )
        )
    # the trials have a lane of their own under the bar, where neither whisker nor target hides them
    for sample in summary.samples:
        if select in sample.accuracy:
            value = sample.accuracy[select]
            dot = element("circle", cx=x(value), cy=y + 12, r=3.2, class_=f"dot {colour}")
            dot.append(element("title", f"{cell.variant}, fold {sample.fold}, seed {sample.seed}: {percent(value)} %"))
            drawn.append(dot)
    if summary.comparison is not None and summary.comparison.theirs is not None:
        theirs = x(summary.comparison.theirs)
        mark = element("path", d=f"M{theirs:.1f} {y - 19:.1f}v28", class_="paper-mark")
        source = summary.comparison.published.source
        mark.append(element("title", f"the paper, {source}: {percent(summary.comparison.theirs)} %"))
        drawn.append(mark)
    drawn.append(element("text", selected.percent_std, x=x.end + 14, y=y - 1, class_="value"))
    return drawn
