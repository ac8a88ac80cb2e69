"""A page that takes plotly.js from its CDN, in Chromium: the right file, a wrong one, and none."""

import pytest
from plotly.offline import get_plotlyjs

from lab.report.synthetic_runs import write_likely_run
from sinkgd.lab.report import build_page
from sinkgd.lab.report.shell import from_cdn

pytestmark = pytest.mark.browser
CHARTS = "[...document.querySelectorAll('.chart')]"
DRAWN = f"{CHARTS}.every((chart) => chart.querySelector('.main-svg'))"
UNDRAWN = f"{CHARTS}.every((chart) => chart.innerText.includes('--cdn'))"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_likely_run(folder, recipe, 0) for recipe in ("adamw", "sinkgd")]
    whole = build_page(runs, baseline="adamw", title="T", command="C")
    small = from_cdn(whole)
    assert len(small) < len(whole) - len(get_plotlyjs()) + 1000
    path = folder / "small.html"
    path.write_text(small, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Open the page where ``script`` is what the CDN gives; None: it cannot be reached."""
    pages = []

    def opened(script):
        asked, errors = [], []

        def answer(route):
            asked.append(route.request.url)
            if script is None:
                route.abort()
            else:
                headers = {"Access-Control-Allow-Origin": "*", "Content-Type": "text/javascript"}
                route.fulfill(body=script, headers=headers)

        page = browser.new_page()
        pages.append(page)
        page.route("https://**/*", answer)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        assert page.locator(".chart").count() > 5
        assert len(asked) == 1
        assert asked[0].startswith("https://cdn.plot.ly/plotly-")
        return page, asked, errors

    yield opened
    for page in pages:
        page.close()


@pytest.mark.parametrize(
    ("script", "seen"),
    [(get_plotlyjs(), DRAWN), (get_plotlyjs() + " ", UNDRAWN), (None, UNDRAWN)],
    ids=["the file", "another file", "no network"],
)
def test_charts_are_drawn_by_the_very_file_and_by_no_other(visit, script, seen):
    page, _, errors = visit(script)
    assert page.evaluate(seen)
    assert errors == []


def test_the_policy_lets_no_other_address_in(visit):
    page, asked, _ = visit(get_plotlyjs())
    page.evaluate(
        "() => new Promise((done) => {"
        " const script = document.createElement('script');"
        " script.onload = script.onerror = done;"
        " script.src = 'https://cdn.plot.ly/other.js';"
        " document.head.append(script); })"
    )
    assert len(asked) == 1
