"""Plots: what can be read from them without colour, on dark screens, and off their axes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from realign.review import page
from realign.review.plots import (
    BLUE,
    DARK,
    LINES,
    ORANGE,
    PALE_ORANGE,
    Axis,
    Difference,
    bar_plot,
    compared_histogram,
    difference_plot,
    histogram,
    line_plot,
    rank_plot,
)

COUNTS = {1: 3, 2: 1}
PLOTS = {
    "lines": line_plot("t", {"a": [(1, 2.0), (2, 3.0)], "b": [(1, 1.0), (2, 2.0)]}, Axis("nats")),
    "bars": bar_plot("t", {"a": (0.5, 0.4, 0.6)}),
    "ranks": rank_plot(COUNTS),
    "histogram": histogram("t", {"accepted": [0.1, 0.2], "refused": [0.2]}, "cosine"),
    "lengths": compared_histogram("t", {"chosen": [3, 4], "rejected": [5]}, "words"),
    "differences": str(difference_plot("t", [Difference("x", 1.0, 0.5, 1.5, "better", True)])),
}


def texts(plot: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", plot)


def ticks(plot: str, axis: str) -> list[float]:
    """The labels of the ticks of an axis."""
    parts = re.findall(rf'<g id="{axis}tick_\d+">(.*?)</text>', plot, flags=re.DOTALL)
    return [float(part.rpartition(">")[2].replace("−", "-")) for part in parts]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("lines", ["step", "nats"]),
        ("bars", ["percent"]),
        ("ranks", ["rank", "pairs"]),
        ("histogram", ["cosine", "retrieved images"]),
        ("lengths", ["words", "answers"]),
        ("differences", ["percentage points"]),
    ],
)
def test_axes_name_their_quantities(name: str, labels: list[str]) -> None:
    assert {*labels} <= {*texts(PLOTS[name])}


@pytest.mark.parametrize("most", [1, 2, 3, 5, 17, 53])
def test_counts_have_whole_ticks(most: int) -> None:
    plots = (
        rank_plot({1: most, 2: 1}),
        histogram("t", {"accepted": [0.5] * most, "refused": [0.1]}, "cosine"),
        compared_histogram("t", {"chosen": [4] * most, "rejected": [9]}, "words"),
    )
    for plot in plots:
        found = ticks(plot, "y")
        assert len(found) >= 2
        assert found == [round(tick) for tick in found]


def test_a_single_rank_is_a_sentence_instead_of_a_plot() -> None:
    assert rank_plot({1: 1_234, 2: 0}) == (
        "<p>The retrieved image of every pair (1,234) has rank 1.</p>"
    )
    assert rank_plot({}) == ""
    assert ticks(rank_plot({1: 3, 4: 2}), "x") == [1, 2, 3, 4]  # no rank is left out


def strokes(plot: str) -> list[str]:
    """The styles of the lines that show data."""
    styles = re.findall(r'style="([^"]+)"', without_style(plot))
    return [style for style in styles if "fill: none" in style and "stroke-width: 1.6" in style]


def without_style(plot: str) -> str:
    return re.sub(r"<style.*?</style>", "", str(plot), flags=re.DOTALL)


def test_series_differ_in_the_kind_of_line() -> None:
    many = {str(number): [(1.0, 0.0), (2.0, float(number))] for number in range(len(LINES))}
    shown = strokes(line_plot("t", many))
    kinds = {"".join(re.findall(r"stroke-dasharray: [^;]+", style)) for style in shown}
    assert len(kinds) == len(many)
    assert {"dasharray" in style for style in strokes(PLOTS["lengths"])} == {True, False}


@pytest.mark.parametrize("name", PLOTS)
def test_every_colour_has_a_variant_for_dark_screens(name: str) -> None:
    plot = str(PLOTS[name])
    style, drawing = plot.partition("</style>")[0], without_style(plot)
    used = {*re.findall(r"#[0-9a-f]{6}", drawing)}
    assert used
    assert used <= DARK.keys()
    rules = [f'[style*="{kind}: {color}"]' for color in used for kind in ("fill", "stroke")]
    assert [rule for rule in rules if rule not in style] == []


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    red, green, blue = linear(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize(("paper", "is_dark"), [("#ffffff", False), ("#1b202a", True)])
def test_texts_and_lines_stand_out_from_the_page(name: str, paper: str, is_dark: bool) -> None:
    written = re.findall(r'<text style="[^"]*fill: (#[0-9a-f]{6})', without_style(PLOTS[name]))
    assert written
    for color in written:
        assert contrast(DARK[color] if is_dark else color, paper) >= 7
    for style in strokes(PLOTS[name]):
        color = re.findall(r"stroke: (#[0-9a-f]{6})", style)[0]
        assert contrast(DARK[color] if is_dark else color, paper) >= 2.5


def test_labels_are_not_on_the_lines() -> None:
    long = "named objects of a very long name that has to be broken somewhere, more than once: " * 2
    found = [Difference(long, 4.0, -3.0, 8.0, "noise", True) for _ in range(3)]
    plot = without_style(difference_plot("t", found))
    path = r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+) \n" clip-path[^>]*stroke: #475467'
    lines = [float(y) for y, end in re.findall(path, plot) if y == end]
    place = r'<text style="font-size: 9px[^>]*transform="translate\([\d.]+ ([\d.]+)\)"'
    labels = [float(y) for y in re.findall(place, plot)]
    assert len(lines) == 3
    assert len(labels) == 12  # four lines each
    for line in lines:
        assert not [y for y in labels if line - 5 < y < line + 12]  # of letters 9 points high


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0, of linear RGB
BLINDNESS = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
               (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
               (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
               (0.004733, 0.691367, 0.303900)),
}  # fmt: skip
PAIRS = [("good", "bad"), ("good-bg", "bad-bg"), ("good", "flag"), ("bad", "flag")]


def linear(color: str) -> list[float]:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def seen(color: str, blindness: str) -> list[float]:
    """A colour as it is seen, in steps of 255."""
    mixed = [
        sum(share * part for share, part in zip(row, linear(color), strict=True))
        for row in BLINDNESS[blindness]
    ]
    return [255 * (1.055 * max(0.0, min(1.0, part)) ** (1 / 2.4) - 0.055) for part in mixed]


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_differ_for_every_kind_of_colour_vision(blindness: str) -> None:
    css = (Path(page.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    pairs = [(BLUE, ORANGE), (BLUE, PALE_ORANGE), (DARK[BLUE], DARK[ORANGE])]
    for scheme in (light, dark):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        pairs += [(colors[one], colors[other]) for one, other in PAIRS]
    for one, other in pairs:
        distance = math.dist(seen(one, blindness), seen(other, blindness))
        assert distance > 25, (one, other, distance)


@pytest.mark.parametrize(
    ("name", "label", "series"),
    [
        ("lines", "step", ["a", "b"]),
        ("histogram", "cosine", ["accepted", "refused"]),
        ("lengths", "words", ["chosen", "rejected"]),
    ],
)
def test_legends_are_below_the_axis_label(name: str, label: str, series: list[str]) -> None:
    """Below the plot they cover no data, and matplotlib does not search for a free place."""
    heights: dict[str, float] = {}
    for style, text in re.findall(r"<text([^>]*)>([^<]+)</text>", without_style(PLOTS[name])):
        rotated = re.search(r"translate\([\d.]+ ([\d.]+)\)", style)
        plain = re.search(r' y="([\d.]+)"', style)
        heights[text] = float((rotated or plain or [0, "nan"])[1])
    assert min(heights[one] for one in series) > heights[label] + 5


def test_a_dollar_in_a_name_is_not_read_as_a_formula() -> None:
    assert "a$x_{$b" in bar_plot("a$x_{$b", {"m$y_{$": (0.5, 0.4, 0.6)})
