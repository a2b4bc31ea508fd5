"""Plots of the report as inline SVG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from realign.errors import RefusedError

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    raise RefusedError("The report needs matplotlib. Install 'realign[pipeline,report]'.") from None

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
        "svg.hashsalt": "realign",  # equal data, equal file
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#98a2b3",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#eaecf0",
        "xtick.color": "#667085",
        "ytick.color": "#667085",
        "legend.frameon": False,
    }
)
COLORS = ("#98a2b3", "#5b8def", "#117a4b", "#d98e04", "#8e3cbe", "#b42318")


def _axes(title: str, label: str = "", *, has_vertical_grid: bool = False) -> Any:
    axes = Figure(figsize=(4.6, 2.7)).subplots()
    axes.grid(axis="x", visible=has_vertical_grid)
    axes.set_title(title)
    axes.set_xlabel(label, color="#667085")
    return axes


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
    return Markup(text[text.index("<svg") :])  # matplotlib's own markup, its labels escaped by it


def line_plot(
    title: str, lines: Mapping[str, Sequence[tuple[float, float]]], zero_line: float | None = None
) -> Markup:
    """Return curves over steps.

    Args:
        title: Above the plot.
        lines: Label to (step, value) points.
        zero_line: Height of a dashed reference line.
    """
    axes = _axes(title, "step", has_vertical_grid=True)
    if zero_line is not None:
        axes.axhline(zero_line, color="#98a2b3", linestyle="--", linewidth=1)
    for color, (label, points) in zip(COLORS[1:], lines.items(), strict=False):
        # a line of one point has no length
        marker = "o" if len(points) == 1 else None
        axes.plot(
            *zip(*points, strict=True), label=label, color=color, linewidth=1.6, marker=marker
        )
    if len(lines) > 1:
        axes.legend(fontsize=9)
    return _svg(axes)


class Difference(NamedTuple):
    """A difference with its interval, as it is plotted."""

    label: str
    value: float
    low: float
    high: float
    verdict: str
    """``better`` or ``worse`` where it is not inside the noise."""
    more_is_better: bool


def difference_plot(title: str, differences: Sequence[Difference]) -> Markup | None:
    """Return a line for every difference: its interval, and a point that is filled where it is not
    inside the noise. None where there is no difference.

    Args:
        title: Above the plot.
        differences: From the top to the bottom.
    """
    if not differences:
        return None
    axes = Figure(figsize=(4.4, 0.8 + 0.5 * len(differences))).subplots()
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    axes.axvline(0, color="#98a2b3", linewidth=1)
    for place, found in enumerate(differences):
        is_clear = found.verdict in ("better", "worse")
        color = {"better": COLORS[2], "worse": COLORS[5]}.get(found.verdict, "#667085")
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=1.6)
        marker = {"better": "^", "worse": "v"}.get(found.verdict, "o")
        face = color if is_clear else "none"
        axes.plot(found.value, place, marker, color=color, markerfacecolor=face, markersize=7)
        less = "" if found.more_is_better else " (less is better)"
        axes.annotate(  # above its line, so that the plot is narrow enough for a phone
            f"{found.label}{less}: {found.value:+.1f}", (0, place), (0, 7),
            xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=9,
            color="#344054",
        )  # fmt: skip
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(differences) - 0.5, -0.9)
    return _svg(axes)


def bar_plot(
    title: str,
    bars: Mapping[str, tuple[float, float, float] | None],
    scale: int = 100,
    note: str = "",
) -> Markup:
    """Return one bar per model with its interval and its value, from 0.

    Args:
        title: Above the plot.
        bars: Label to (value, low, high); None, which is not defined, is a dash.
        scale: Factor of the values; 100 plots fractions in percent.
        note: Below the plot, such as why a value is not defined.
    """
    axes = _axes(title, note)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_xlim(-0.5, max(1, len(bars)) - 0.5)
    ends = [0.0]
    for position, bar in enumerate(bars.values()):
        value, low, high = (scale * end for end in bar or (0.0, 0.0, 0.0))
        ends += [value, low, high]
        if bar:
            # a bar's length is its value; small differences are read from the numbers and the
            # intervals, which need not hold the value where draws are left out of them
            axes.bar(position, value, color=COLORS[position % len(COLORS)], width=0.6)
            axes.plot([position, position], [low, high], color="#344054", marker="_", markersize=6)
        axes.annotate(
            f"{value:.1f}" if bar else "—", (position, max(value, high)), (0, 3),
            textcoords="offset points", ha="center", fontsize=9, color="#344054",
        )  # fmt: skip
    axes.set_ylim(1.12 * min(ends), 1.12 * max(ends) or float(min(ends) == 0))
    return _svg(axes)


def count_plot(title: str, counts: Mapping[str, int]) -> Markup:
    """Return a bar plot of counts by category."""
    axes = _axes(title)
    axes.bar(list(counts), list(counts.values()), color=COLORS[1], width=0.7)
    return _svg(axes)


def histogram(
    title: str,
    values: Mapping[str, Sequence[float]],
    *,
    line: tuple[float, str] | None = None,
    bins: int = 30,
) -> Markup:
    """Return a histogram of several series, stacked.

    Args:
        title: Above the plot.
        values: Label to values; empty series are left out.
        line: A value to mark, and what it is called.
        bins: How many bars, over the range of all values.
    """
    axes = _axes(title)
    shown = {label: series for label, series in values.items() if len(series)}
    # green is what passed, red what did not, as everywhere on the page
    colors = {"accepted": COLORS[2], "chosen": COLORS[2], "refused": "#f0a8a0"}
    axes.hist(
        list(shown.values()),
        bins=bins,
        stacked=True,
        label=list(shown),
        color=[colors.get(label, COLORS[1]) for label in shown],
    )
    if line:
        axes.axvline(line[0], color="#344054", linestyle="--", linewidth=1, label=line[1])
    if len(shown) > 1 or line:
        axes.legend(fontsize=9)
    return _svg(axes)


def compared_histogram(
    title: str, values: Mapping[str, Sequence[int]], label: str, bins: int = 30
) -> Markup:
    """Return the outlines of several distributions of whole numbers in one plot.

    Args:
        title: Above the plot.
        values: Label to values.
        label: Of the axis.
        bins: At most so many steps.
    """
    axes = _axes(title, label)
    low = min(map(min, values.values()))
    high = max(map(max, values.values())) + 1
    step = -(-(high - low) // bins)
    edges = [low - 0.5 + step * i for i in range(-(-(high - low) // step) + 1)]
    colors = {"chosen": COLORS[2], "rejected": COLORS[5]}
    for name, series in values.items():
        axes.hist(
            series, bins=edges, histtype="step", label=name, color=colors.get(name), linewidth=1.6
        )
    axes.legend(fontsize=9)
    return _svg(axes)
