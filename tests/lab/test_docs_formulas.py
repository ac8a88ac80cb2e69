"""A browser shows the formulas of the documents, and no page shows their source."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = re.compile(r"\\[(\[]|\.\. math::|:math:|\$(?!\d)")
WITH_FORMULAS = {"how-it-works", "norms", "reference/functions", "reference/optimizers"}
PROSE = """() => {
  const main = document.querySelector("article").cloneNode(true);
  main.querySelectorAll("pre, code, annotation").forEach((node) => node.remove());
  return main.textContent;
}"""
SIZES = """() => [...document.querySelectorAll("math")].map((node) => {
  const box = node.getBoundingClientRect();
  const frame = node.closest("div.formula");
  const right = frame ? frame.getBoundingClientRect().right : box.right;
  const errors = node.querySelectorAll("merror").length;
  return {width: box.width, height: box.height, right, errors};
})"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_shows_formulas_and_not_their_source(site, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    shown = set()
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).with_suffix("").as_posix()
        if name.startswith("studies/") or name == "404":
            continue
        page.goto(path.as_uri())
        found = SOURCE.search(page.evaluate(PROSE))
        assert found is None, f"{name} shows {found}"
        for box in page.evaluate(SIZES):
            shown.add(name)
            assert min(box["width"], box["height"]) > 0, (name, box)
            assert not box["errors"], (name, box)
            assert box["right"] <= width, (name, box)
    page.close()
    assert shown >= WITH_FORMULAS
