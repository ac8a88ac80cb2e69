"""What tests of pages, and of plans, share."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from sinkgd.lab.plan import planner

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, one a file."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is missing: the pages are NOT tested; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan two models beside the one that is asked for, instead of all sizes."""
    monkeypatch.setattr(
        planner.make_plan,
        "__kwdefaults__",
        planner.make_plan.__kwdefaults__ | {"ladder": ("llama-60m", "llama-3-8b")},
    )
