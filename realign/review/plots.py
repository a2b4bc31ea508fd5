"""Plots of the report as inline SVG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

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
        axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.6)
    if len(lines) > 1:
        axes.legend(fontsize=9)
    return _svg(axes)


def bar_plot(
    title: str, bars: Mapping[str, tuple[float, float, float]], scale: int = 100
) -> Markup:
    """Return one bar per model with its interval and its value, from 0.

    Args:
        title: Above the plot.
        bars: Label to (value, low, high).
        scale: Factor of the values; 100 plots fractions in percent.
    """
    axes = _axes(title)
    values = [scale * value for value, _, _ in bars.values()]
    errors = [
        [scale * (v - low) for v, low, _ in bars.values()],
        [scale * (high - v) for v, _, high in bars.values()],
    ]
    colors = [COLORS[i % len(COLORS)] for i in range(len(bars))]
    # a bar's length is its value; small differences are read from the numbers and the intervals
    axes.bar(list(bars), values, color=colors, width=0.6, yerr=errors, ecolor="#344054", capsize=3)
    for position, (value, (_, _, high)) in enumerate(zip(values, bars.values(), strict=True)):
        axes.annotate(
            f"{value:.1f}", (position, scale * high), (0, 3), textcoords="offset points",
            ha="center", fontsize=9, color="#344054",
        )  # fmt: skip
    highest = max(scale * high for _, _, high in bars.values())
    axes.set_ylim(0, 1.12 * highest or 1.0)
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
