"""The pages of the recorded studies in Chromium: whatever was found has room, on a phone too."""

from pathlib import Path

import pytest

from lab.bench.test_page_in_browser import CUT_OFF, CUT_TABLES
from sinkgd.lab.cli import main

pytestmark = [pytest.mark.browser, pytest.mark.slow]
RECORDS = Path(__file__).parents[3] / "benchmarks/studies"


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDS.iterdir()))
def test_nothing_is_cut_off(browser, tmp_path, name):
    path = tmp_path / "page.html"
    assert main(["report", str(RECORDS / name), "--out", str(path)]) == 0
    for width in (390, 1280):
        said = []
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto(path.as_uri())
        assert page.locator(".main-svg").count() > 0
        assert said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_OFF) == []
        assert page.evaluate(CUT_TABLES) == []
        page.close()
