"""Both pages in a real Chromium: `make test-browser`."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from realign.building.run import build
from realign.data.dataset import read_kept_records, read_records
from realign.data.decisions import read_decisions
from realign.demo.data import build_config, write_training_data
from realign.review.report import write_report
from tests.realign.review.test_score_part import page_of, scores  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(scope="module")
def chromium():
    """The browser of this machine; a test that was asked for fails where there is none."""
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.fail(f"no Chromium on the PATH: looked for {', '.join(CHROMIUMS)}. Install one.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not installed. Install it: pip install -e '.[browser]'.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A tab in which an error of a script or of the policy fails the test."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    yield tab
    tab.close()
    assert problems == []


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    write_training_data(folder / "world", 24, 0)
    return build(build_config(folder / "world", folder / "run" / "dataset", 0)).parent


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "dataset"))


@pytest.fixture
def address(dataset: Path) -> Iterator[str]:
    """The real server on a free port."""
    command = [sys.executable, "-m", "realign.cli", "browse", str(dataset), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+/\S+", line):
                break
        else:
            pytest.fail("the server did not start")
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode in (143, -signal.SIGTERM)


def decided(dataset: Path) -> dict[str, tuple[str, str]]:
    found = read_decisions(dataset / "decisions.jsonl").values()
    return {decision.id: (decision.decision, decision.note) for decision in found}


def test_clicks_and_keys_become_decisions(page, dataset: Path, address: str) -> None:
    ids = [record.id for record in read_records(dataset, None)]
    page.goto(address)
    assert "token" not in page.url
    cards = page.locator("#pairs > article")
    widths = page.eval_on_selector_all("#pairs img", "images => images.map(i => i.naturalWidth)")
    assert len(widths) == 2 * cards.count()
    assert min(widths) > 0

    def saved(index: int, decision: str) -> None:
        page.wait_for_selector(f"article[data-number='{index}'][data-decision={decision}]")

    cards.nth(0).get_by_role("button", name="drop").click()
    saved(0, "drop")
    cards.nth(1).locator("[name=note]").fill('looks <b>odd</b> & "so"')
    cards.nth(1).get_by_role("button", name="flag").click()
    saved(1, "flag")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    saved(2, "keep")
    page.keyboard.press("d")  # the next one was selected
    saved(3, "drop")
    page.keyboard.press("n")
    page.keyboard.type("d k f", delay=5)  # typed, not decided
    page.keyboard.press("Escape")
    page.keyboard.press("f")
    saved(4, "flag")
    assert decided(dataset) == {
        ids[0]: ("drop", ""),
        ids[1]: ("flag", 'looks <b>odd</b> & "so"'),
        ids[2]: ("keep", ""),
        ids[3]: ("drop", ""),
        ids[4]: ("flag", "d k f"),
    }
    assert page.locator("[data-count=drop]").text_content() == "2"
    left = [record.id for record in read_kept_records(dataset, None)]
    assert left == [row for row in ids if row not in (ids[0], ids[3])]

    page.get_by_role("link", name="flagged").click()
    assert [text.split()[1] for text in page.locator(".row-id").all_text_contents()] == [
        ids[1], ids[4],
    ]  # fmt: skip
    assert cards.nth(0).locator("[name=note]").input_value() == 'looks <b>odd</b> & "so"'
    cards.nth(0).get_by_role("button", name="keep").click()
    saved(1, "keep")
    page.reload()
    assert page.locator(".row-id").count() == 1
    assert decided(dataset)[ids[1]][0] == "keep"


def test_the_gallery_filters_sorts_and_pages(page, dataset: Path, address: str) -> None:
    records = read_records(dataset, None)
    page.goto(address)
    page.locator("[name=sort]").select_option("-similarity")
    page.wait_for_url("**sort=-similarity**")
    values = page.locator(".facts").all_text_contents()
    shown = [float(re.findall(r"similarity ([\d.]+)", text)[0]) for text in values]
    assert shown == sorted(shown, reverse=True)
    with page.expect_navigation():
        page.keyboard.press("ArrowRight")
    assert page.locator(".row-id").count() == min(24, len(records) - 24)
    page.goto(page.url.partition("?")[0] + "?rank=2")
    expected = sum(record.meta["retrieval"]["rank"] == 2 for record in records)
    assert page.locator(".row-id").count() == expected > 0


def test_a_stopped_server_is_reported(
    chromium, dataset: Path, tmp_path: Path, address: str
) -> None:
    tab = chromium.new_page()
    tab.goto(address)
    tab.route("**/decide", lambda route: route.abort())
    tab.locator("#pairs > article").nth(0).get_by_role("button", name="drop").click()
    tab.wait_for_selector("#problem:not([hidden])")
    assert "Not saved: the server does not answer" in tab.locator("#problem").inner_text()
    assert tab.locator("article[data-decision=drop]").count() == 0
    assert not (dataset / "decisions.jsonl").exists()
    tab.close()


def test_another_page_of_this_machine_cannot_decide(chromium, dataset: Path, address: str) -> None:
    record = read_records(dataset, None)[0]
    context = chromium.new_context()
    tab = context.new_page()
    tab.goto(address)
    port = address.split(":")[2].partition("/")[0]
    other = context.new_page()
    other.route("http://127.0.0.1:1/**", lambda route: route.fulfill(body="<p>other", status=200))
    other.goto("http://127.0.0.1:1/")
    body = f'{{"number": 0, "key": "{record.key}", "decision": "drop"}}'
    other.evaluate(
        """([port, body]) => fetch(`http://127.0.0.1:${port}/decide`, {
            method: "POST", mode: "no-cors", credentials: "include", body}).catch(() => 0)""",
        [port, body],
    )
    loads = other.evaluate(
        """port => new Promise((done) => {
            const image = new Image();
            image.onload = () => done(true);
            image.onerror = () => done(false);
            image.src = `http://127.0.0.1:${port}/image/0/original`;
        })""",
        port,
    )
    context.close()
    assert loads is False
    assert not (dataset / "decisions.jsonl").exists()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_reports_gallery_sorts_and_filters(page, dataset: Path, width: int) -> None:
    records = read_records(dataset, None)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(write_report(dataset).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    visible = page.locator("#pairs > article:not([hidden])")

    def ids() -> list[str]:
        return visible.evaluate_all("cards => cards.map(card => card.dataset.id)")

    assert ids() == [record.id for record in records]
    for sort, name in (("-similarity", "similarity"), ("-cosine", "retrieval")):
        page.locator("[name=sort]").select_option(sort)
        part = "value" if name == "similarity" else "cosine"
        expected = sorted(records, key=lambda record: -record.meta[name][part])
        assert ids() == [record.id for record in expected]
    page.locator("[name=sort]").select_option("index")
    page.locator("[name=rank]").select_option("1")
    page.locator("[name=most]").fill("0.5")
    expected = [
        record.id
        for record in records
        if record.meta["retrieval"]["rank"] == 1 and record.meta["similarity"]["value"] <= 0.5
    ]
    assert ids() == expected
    shown = page.locator("output[name=shown]").text_content()
    assert shown == f"{len(expected)} of {len(records)}"
    page.locator("[name=text]").fill("no such words")
    assert ids() == []
    assert page.locator("#nothing").is_visible()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_gallery_opens_at_its_top_and_fits(page, address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 860})
    page.goto(address)
    page.wait_for_selector("article.current")
    assert page.evaluate("scrollY") == 0
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("h1").bounding_box()["y"] >= 0
    assert page.locator("#pairs > article").first.bounding_box()["y"] < 500
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    box = page.locator("article.current").bounding_box()
    bar = page.locator(".bar").bounding_box()
    assert bar["y"] + bar["height"] <= box["y"]  # the bar hides no part of the selected pair


def test_decisions_are_undone_by_key_and_button(page, dataset: Path, address: str) -> None:
    ids = [record.id for record in read_records(dataset, None)]
    page.goto(address)
    cards = page.locator("#pairs > article")
    cards.nth(1).locator("[name=note]").fill("a note")
    cards.nth(1).get_by_role("button", name="flag").click()
    page.wait_for_selector("article[data-number='1'][data-decision=flag]")
    cards.nth(1).get_by_role("button", name="drop").click()
    page.wait_for_selector("article[data-number='1'][data-decision=drop]")
    page.keyboard.press("u")
    page.wait_for_selector("article[data-number='1'][data-decision=flag]")
    notice = page.locator("#undone").inner_text()
    assert notice == f"Undone: drop of row {ids[1]}, which is flag now."
    assert page.locator("[data-count=flag]").text_content() == "1"
    page.reload()
    page.locator("#undo").click()
    page.wait_for_selector("article[data-number='1'][data-decision=undecided]")
    assert cards.nth(1).locator("[name=note]").input_value() == ""
    assert cards.nth(1).locator("[aria-pressed=true]").count() == 0
    assert decided(dataset) == {}


def test_the_keyboard_shortcuts_are_listed(page, dataset: Path, address: str) -> None:
    page.goto(address)
    keys = page.locator("#keys")
    assert not keys.is_visible()
    page.keyboard.press("?")
    assert "undo the last decision" in keys.inner_text()
    page.keyboard.press("d")  # nothing is decided behind the list
    page.keyboard.press("Escape")
    assert not keys.is_visible()
    page.get_by_role("button", name="Keys").click()
    assert keys.is_visible()
    page.get_by_role("button", name="Close").click()
    assert not keys.is_visible()
    assert not (dataset / "decisions.jsonl").exists()


CONTRASTS = """() => {
    const light = ([r, g, b]) => [r, g, b].reduce((sum, part, place) => {
        const p = part / 255;
        const linear = p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4;
        return sum + [0.2126, 0.7152, 0.0722][place] * linear;
    }, 0);
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const behind = (element) => {
        for (let one = element; one; one = one.parentElement) {
            const found = parts(getComputedStyle(one).backgroundColor);
            if (found.length === 3 || found[3] === 1) return found;
        }
        return [255, 255, 255];
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
        if (element.closest("style, script, button")) continue;
        const style = getComputedStyle(element);
        const color = element.closest("svg") ? style.fill : style.color;
        const [low, high] = [light(parts(color)), light(behind(element))].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), walker.currentNode.textContent.trim()]);
    }
    return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_secondary_texts_and_plots_are_legible(
    page, dataset: Path, address: str, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)
    for place in (address, write_report(dataset).as_uri()):
        page.goto(place)
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 100
        assert contrasts[0][0] >= 4.5, contrasts[:3]
        soft = page.eval_on_selector_all(
            ".soft, .label, figcaption", "all => all.map(one => one.textContent.trim())"
        )
        low = [(value, text) for value, text in contrasts if value < 7 and text in soft]
        assert low == []


def test_differences_are_marked_without_colour(page, dataset: Path) -> None:
    page.goto(write_report(dataset).as_uri())
    look = "mark => getComputedStyle(mark).textDecorationLine"
    assert page.locator("mark.kept").first.evaluate(look) == "underline"
    assert page.locator("mark.lost").first.evaluate(look) == "line-through"


BROKEN = """() => [...document.querySelectorAll("td, th, .tile b, .interval i")].flatMap((cell) => {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent;
        for (const word of text.matchAll(/[\\d.,%+−-]*\\d[\\d.,%]*/g)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            const tops = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
            if (tops.size > 1) found.push(word[0]);
        }
    }
    return found;
})"""


@pytest.mark.parametrize("width", [400, 700, 1280])
def test_many_models_fit_the_screen_without_broken_numbers(
    page,
    scores,  # noqa: F811
    tmp_path: Path,
    width: int,
) -> None:
    split = scores["benchmarks"]["pope"]["rules"]["official"]["splits"]["random"]
    task = scores["tasks"]["pope_random"]
    for name in ("DPO", "SFT", "rDPO with a name that is long", "rDPO+NLL"):
        scores["models"].append(name)
        split["models"][name] = split["models"]["aligned"]
        task["cut"][name], task["probes"][name] = 0, task["probes"]["aligned"]
    page_of(scores, tmp_path)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(BROKEN) == []
    scrolled = page.locator("details .scroll")
    first = scrolled.locator("td").first
    before = first.bounding_box()["x"]
    scrolled.evaluate("box => box.scrollTo(200, 0)")
    assert first.bounding_box()["x"] == before  # the first column stays
    if width == 400:
        inside = page.locator(".scores").first
        assert inside.evaluate("one => one.scrollWidth <= one.parentElement.clientWidth")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_scores_fit_the_screen_and_are_legible(
    page,
    scores,  # noqa: F811
    tmp_path: Path,
    scheme: str,
    width: int,
) -> None:
    page_of(scores, tmp_path)
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width  # the table scrolls
    color = "element => getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number)"
    fill = color.replace("color.match", "fill.match")
    lightness = {
        "text": sum(page.locator("h2").first.evaluate(color)),
        "plot": sum(page.locator(".wide-plot svg text").last.evaluate(fill)),
    }
    is_light = {name: value > 3 * 128 for name, value in lightness.items()}
    assert is_light == dict.fromkeys(lightness, scheme == "dark")
    verdict = page.locator(".verdict", has_text="better").first
    assert verdict.text_content() == "▲ better"
