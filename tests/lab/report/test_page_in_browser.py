"""The page in Chromium, from the disk: wide and narrow, light and dark, drawn and silent."""

from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page

from lab.report.synthetic_runs import write_likely_run, write_run
from sinkgd.lab.report import write_page

pytestmark = pytest.mark.browser

WIDTHS = (1280, 390)
THEMES = ("light", "dark")
CHARTS = {
    "loss-tokens",
    "loss-seconds",
    "tokens-to-reach",
    "throughput",
    "memory",
    "peak-memory",
    "step-time",
    "published-llama-60m",
    "published-llama-130m",
    "published-llama-350m",
    "published-llama-1b",
}
INK = "#memory .annotation text"
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"

# How many marks of data each chart holds, by its id, and how large its drawing is.
DRAWN = """() => Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => {
    const { width, height } = chart.querySelector(".main-svg").getBoundingClientRect();
    const kinds = [".scatterlayer .js-line", ".scatterlayer .point", ".barlayer .point path"];
    const marks = chart.querySelectorAll(kinds.join());
    const painted = [...marks].filter((mark) => mark.getAttribute("d")?.length > 8);
    return [chart.id, { width, height, marks: painted.length }];
}))"""


@dataclass
class Visit:
    """An open page and all that it said and asked for."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of three recipes with two seeds, a failed run and a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_likely_run(folder, recipe, seed)
        for recipe in ("adamw", "sinkgd", "adamw-one-lr")
        for seed in (0, 1)
    ]
    runs.append(write_run(folder, HOSTILE, {50: 5.0}, status="failed", message=HOSTILE))
    path = folder / "report.html"
    write_page(path, runs, baseline="adamw", title=HOSTILE, command=f"sinkgd compare {'x' * 200}")
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Open the page at a width and in a theme; the context is closed at the end."""
    contexts = []

    def opened(width, theme):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, has_touch=width < 600
        )
        contexts.append(context)
        visit = Visit(context.new_page())
        visit.page.on("console", lambda message: visit.messages.append(message.text))
        visit.page.on("pageerror", lambda error: visit.messages.append(str(error)))
        visit.page.on("dialog", lambda dialog: visit.messages.append(dialog.message))
        visit.page.on("request", lambda request: visit.requests.append(request.url))
        visit.page.goto(address)
        visit.page.wait_for_function("document.querySelectorAll('.main-svg').length >= 22")
        return visit

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("width", "theme"),
    [
        pytest.param(width, theme, marks=() if both else pytest.mark.slow)
        for width in WIDTHS
        for theme in THEMES
        for both in [(width, theme) in {(1280, "light"), (390, "dark")}]
    ],
)
def test_the_page_is_drawn_fits_and_asks_for_nothing(visit, address, width, theme):
    visited = visit(width, theme)
    assert visited.messages == []
    assert [url for url in visited.requests if not url.startswith("data:")] == [address]

    drawn = visited.page.evaluate(DRAWN)
    assert set(drawn) == CHARTS
    for key, chart in drawn.items():
        assert chart["width"] > 200, key
        assert chart["height"] > 150, key
        assert chart["marks"] >= 3, key  # a bar or a line for each recipe

    assert visited.page.evaluate("document.documentElement.scrollWidth") <= width
    overhang = "nodes => nodes.filter(n => n.getBoundingClientRect().right > innerWidth + 1).length"
    assert visited.page.eval_on_selector_all("main > *, figure, .card, .chart", overhang) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_no_words_of_a_chart_are_cut_off(visit, width):
    cut = visit(width, "light").page.evaluate(
        """() => [...document.querySelectorAll(".chart")].flatMap((chart) => {
            const frame = chart.getBoundingClientRect();
            return [...chart.querySelectorAll("svg text")].filter((text) => {
                const box = text.getBoundingClientRect();
                return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1);
            }).map((text) => `${chart.id}: ${text.textContent}`);
        })"""
    )
    assert cut == []


@pytest.mark.parametrize("width", WIDTHS)
def test_no_table_is_wider_than_its_place(visit, width):
    page = visit(width, "light").page
    page.eval_on_selector_all("details", "nodes => nodes.forEach(node => { node.open = true; })")
    wide = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth).map(n => n.textContent)"
    selector = ".scroll, pre" if width == 390 else ".scroll:not(details .scroll)"
    assert page.eval_on_selector_all(selector, wide) == []


def test_a_value_on_a_phone_stands_at_the_right_and_in_one_piece(visit):
    cells = visit(390, "light").page.eval_on_selector_all(
        "td[data-label]",
        """cells => cells.filter(cell => cell.offsetHeight && cell.textContent.trim()).map(cell => {
            const words = document.createRange();
            words.selectNodeContents(cell);
            const boxes = [...words.getClientRects()];
            const { left, right } = words.getBoundingClientRect();
            const holes = right - left - boxes.reduce((sum, box) => sum + box.width, 0);
            return [cell.textContent, cell.getBoundingClientRect().right - right, holes];
        })""",
    )
    assert len(cells) > 100
    assert [cell for cell in cells if cell[1] > 2 or cell[2] > 12] == []


@pytest.mark.slow
def test_the_themes_differ_and_the_charts_follow(visit):
    grounds, inks = set(), set()
    for theme in THEMES:
        page = visit(390, theme).page
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        inks.add(_chart_ink(page))
    assert len(grounds) == len(inks) == 2


def test_the_button_changes_the_theme_and_back(visit):
    visited = visit(1280, "light")
    page = visited.page
    light = page.evaluate("getComputedStyle(document.body).backgroundColor"), _chart_ink(page)
    page.click("#theme")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor"), _chart_ink(page)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.get_by_role("button", name="Switch to the light theme").click()
    assert _chart_ink(page) == light[1]
    assert visited.messages == []


def test_a_change_of_the_systems_theme_redraws(visit):
    page = visit(1280, "light").page
    light = _chart_ink(page)
    page.emulate_media(color_scheme="dark")
    changed = f"light => getComputedStyle(document.querySelector('{INK}')).fill != light"
    page.wait_for_function(changed, arg=light)
    assert _chart_ink(page) != light


def test_hostile_names_run_nothing(visit):
    visited = visit(1280, "light")
    assert visited.page.locator("img").count() == 0
    assert visited.page.title() == HOSTILE
    assert HOSTILE in visited.page.locator(".cautions").inner_text()
    assert visited.messages == []


def _chart_ink(page):
    return page.eval_on_selector(INK, "text => getComputedStyle(text).fill")
