"""Plots of the report as inline SVG, by matplotlib."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from realign.errors import RefusedError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise RefusedError("The report needs matplotlib. Install 'realign[pipeline,report]'.") from None

INK, SOFT, LINE, GRID = "#344054", "#475467", "#98a2b3", "#e4e7ec"
# blue and orange differ for every kind of colour vision, and in lightness where they touch
BLUE, ORANGE, PALE_ORANGE, PURPLE, GREY = "#0b57a4", "#b3540a", "#f3b98a", "#7a2ea8", "#7b8698"
COLORS = (GREY, BLUE, ORANGE, PURPLE)
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))  # of series, beside colours
LABEL_WIDTH = 52  # characters
DARK = {  # every colour above on a dark screen
    INK: "#e6e9ef",
    SOFT: "#b4bdcb",
    LINE: "#7d8797",
    GRID: "#323a47",
    BLUE: "#82bbff",
    ORANGE: "#ffb077",
    PALE_ORANGE: "#8a5a2b",
    PURPLE: "#c07cf5",
    GREY: "#9aa4b5",
}
# every figure carries its colours for dark screens, so that it fits whatever page shows it
RULES = "".join(
    f'[style*="{name}: {light}"]{{{name}:{dark}!important}}'
    for light, dark in DARK.items()
    for name in ("fill", "stroke")
)
STYLE = f"<style>@media (prefers-color-scheme: dark){{{RULES}}}</style>"
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
        "svg.hashsalt": "realign",  # equal data give equal files
        "text.parse_math": False,  # names of models may contain a $
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.titlecolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
)


def _axes(title: str, label: str = "", unit: str = "", *, has_vertical_grid: bool = False) -> Any:
    axes = Figure(figsize=(4.6, 2.7)).subplots()
    axes.grid(axis="x", visible=has_vertical_grid)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    return axes


def _count_axes(title: str, label: str, counted: str) -> Any:
    """Return axes whose heights are counts."""
    axes = _axes(title, label, counted)
    axes.yaxis.set_major_locator(_whole_numbers())
    return axes


def _whole_numbers() -> Any:
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _legend(axes: Any, **options: Any) -> None:
    """Add a legend below the horizontal axis and its label, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22), borderaxespad=0, **options)


def _svg(axes: Any) -> Markup:
    buffer = io.StringIO()
    axes.figure.savefig(
        buffer,
        format="svg",
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        bbox_inches="tight",
        transparent=True,
    )
    text = buffer.getvalue()
    start = text.index("<svg")
    inside = text.index(">", start) + 1
    # the markup is matplotlib's, which escapes labels
    return Markup(f"{text[start:inside]}{STYLE}{text[inside:]}")


class Axis(NamedTuple):
    """The vertical axis of a line plot."""

    unit: str = ""
    line: float | None = None
    """Value of a dashed reference line."""
    ends: tuple[float, float] | None = None
    """Lowest and highest possible value; by default those of the curves."""


def line_plot(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    axis: Axis | None = None,
    label: str = "step",
) -> Markup:
    """Return a plot of curves, which differ in colour and in line style.

    Args:
        title: Title above the plot.
        lines: Label of a curve to its (step, value) points.
        axis: Vertical axis.
        label: Label of the horizontal axis.
    """
    axis = axis or Axis()
    axes = _axes(title, label, axis.unit, has_vertical_grid=True)
    if axis.line is not None:
        axes.axhline(axis.line, color=LINE, linestyle=(0, (2, 2)), linewidth=1)
    for place, (name, points) in enumerate(lines.items()):
        color = COLORS[1:][place % (len(COLORS) - 1)]
        # a line of one point would be invisible
        marker = "o" if len(points) == 1 else None
        style: Any = LINES[place % len(LINES)]
        axes.plot(
            *zip(*points, strict=True),
            label=name, color=color, linestyle=style, linewidth=1.6, marker=marker,
        )  # fmt: skip
    if axis.ends:
        low, high = axis.ends
        room = 0.04 * (high - low)
        axes.set_ylim(low - room, high + room)
    axes.xaxis.set_major_locator(_whole_numbers())
    if len(lines) > 1:
        _legend(axes, handlelength=3)
    return _svg(axes)


class Difference(NamedTuple):
    """A difference with its interval, as it is plotted."""

    label: str
    value: float
    low: float
    high: float
    verdict: str
    """``better`` or ``worse``, or another word if the difference is inside the noise."""
    more_is_better: bool


def difference_plot(
    title: str, differences: Sequence[Difference], unit: str = "percentage points"
) -> Markup | None:
    """Return a plot with the interval of every difference, and a point, which is filled unless the
    difference is inside the noise; None without differences.

    Args:
        title: Title above the plot.
        differences: Differences in order from top to bottom.
        unit: Unit of the horizontal axis.
    """
    if not differences:
        return None
    labels = [
        textwrap.wrap(
            f"{found.label}{'' if found.more_is_better else ' (less is better)'}: "
            f"{found.value:+.1f}",
            LABEL_WIDTH,
        )
        for found in differences
    ]
    # labels stand above their lines, so that the plot is narrow enough for a phone
    heights = [1 + 0.36 * (len(label) - 1) for label in labels]
    axes = Figure(figsize=(4.4, 0.9 + 0.5 * sum(heights))).subplots()
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    axes.set_xlabel(unit)
    places = [total - 1 for total in itertools.accumulate(heights)]
    for place, label, found in zip(places, labels, differences, strict=True):
        is_clear = found.verdict in ("better", "worse")
        color = {"better": BLUE, "worse": ORANGE}.get(found.verdict, SOFT)
        axes.plot([0, 0], [place - 0.16, place + 0.16], color=LINE, linewidth=1.6)  # not on labels
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=1.6)
        marker = {"better": "^", "worse": "v"}.get(found.verdict, "o")
        face = color if is_clear else "none"
        axes.plot(found.value, place, marker, color=color, markerfacecolor=face, markersize=7)
        axes.annotate(
            "\n".join(label), (0, place), (0, 7), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(sum(heights) - 0.5, -0.9)
    return _svg(axes)


def bar_plot(
    title: str,
    bars: Mapping[str, tuple[float, float, float] | None],
    scale: int = 100,
    note: str = "",
    unit: str = "percent",
) -> Markup:
    """Return one bar per model with its interval and its value, from 0.

    Args:
        title: Title above the plot.
        bars: Label to (value, low, high), or to None for an undefined value, shown as a dash.
        scale: Factor of the values; 100 plots fractions in percent.
        note: Text below the plot, such as the reason why a value is undefined.
        unit: Unit of the vertical axis, after the multiplication by ``scale``.
    """
    axes = _axes(title, note, unit)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_xlim(-0.5, max(1, len(bars)) - 0.5)
    ends = [0.0]
    for position, bar in enumerate(bars.values()):
        value, low, high = (scale * end for end in bar or (0.0, 0.0, 0.0))
        ends += [value, low, high]
        if bar:
            # bars start at 0, so small differences are read from the numbers and the intervals;
            # an interval need not contain its value, since undefined draws are left out of it
            axes.bar(position, value, color=COLORS[position % len(COLORS)], width=0.6)
            axes.plot([position, position], [low, high], color=INK, marker="_", markersize=6)
        axes.annotate(
            f"{value:.1f}" if bar else "—", (position, max(value, high)), (0, 3),
            textcoords="offset points", ha="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_ylim(1.12 * min(ends), 1.12 * max(ends) or float(min(ends) == 0))
    return _svg(axes)


def rank_plot(counts: Mapping[int, int]) -> Markup:
    """Return a bar plot of pairs by the rank of their retrieved image; only a sentence if all have
    the same rank, and nothing without pairs.

    Args:
        counts: Rank, from 1, to its number of pairs.
    """
    found = {rank: count for rank, count in counts.items() if count}
    if len(found) < 2:
        sentence = "<p>The retrieved image of every pair ({:,}) has rank {}.</p>"
        return Markup().join(Markup(sentence).format(n, rank) for rank, n in found.items())
    axes = _count_axes("Rank of the accepted image", "rank", "pairs")
    ranks = range(1, max(found) + 1)
    axes.bar([*map(str, ranks)], [found.get(rank, 0) for rank in ranks], color=BLUE, width=0.7)
    return _svg(axes)


def histogram(
    title: str,
    values: Mapping[str, Sequence[float]],
    label: str,
    *,
    line: tuple[float, str] | None = None,
    bins: int = 30,
) -> Markup:
    """Return a histogram of several series, stacked.

    Args:
        title: Title above the plot.
        values: ``accepted`` or ``refused`` to its values; empty series are left out.
        label: Label of the horizontal axis.
        line: Value to mark with a line, and the label of the line.
        bins: Number of bars over the range of all values.
    """
    axes = _count_axes(title, label, "retrieved images")
    shown = {label: series for label, series in values.items() if len(series)}
    # as everywhere on the page, blue passed and orange did not
    colors = {"accepted": BLUE, "refused": PALE_ORANGE}
    axes.hist(
        list(shown.values()),
        bins=bins,
        stacked=True,
        label=list(shown),
        color=[colors[name] for name in shown],
    )
    if line:
        axes.axvline(line[0], color=INK, linestyle="--", linewidth=1, label=line[1])
    if len(shown) > 1 or line:
        _legend(axes)
    return _svg(axes)


def compared_histogram(
    title: str, values: Mapping[str, Sequence[int]], label: str, bins: int = 30
) -> Markup:
    """Return the outlines of several distributions of whole numbers in one plot.

    Args:
        title: Title above the plot.
        values: ``chosen`` or ``rejected`` to its values.
        label: Label of the horizontal axis.
        bins: Largest number of bins.
    """
    axes = _count_axes(title, label, "answers")
    low = min(map(min, values.values()))
    high = max(map(max, values.values())) + 1
    step = -(-(high - low) // bins)
    edges = [low - 0.5 + step * i for i in range(-(-(high - low) // step) + 1)]
    looks: Any = {"chosen": (BLUE, "-"), "rejected": (ORANGE, "--")}
    for name, series in values.items():
        color, style = looks[name]
        axes.hist(
            series, bins=edges, histtype="step", label=name, color=color, linestyle=style,
            linewidth=1.6,
        )  # fmt: skip
    # the legend shows lines, since the default patch does not show the dashes
    handles = [
        Line2D([], [], color=looks[name][0], linestyle=looks[name][1], label=name)
        for name in values
    ]
    _legend(axes, handles=handles, handlelength=3)
    return _svg(axes)
