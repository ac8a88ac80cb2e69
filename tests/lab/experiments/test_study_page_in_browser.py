"""A study's page in Chromium, from the disk: one request, charts drawn, no wider than a phone."""

import pytest

from lab.bench.test_page_in_browser import CUT_OFF, CUT_TABLES, MARKS
from lab.experiments.synthetic_study import made_up_record
from sinkgd.lab.disk import write_whole
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.study_report import study_page
from sinkgd.lab.experiments.study_results import StudyResults

pytestmark = pytest.mark.browser

LOSSES = {
    "iterations": {
        **{f"L{count}": [4.2 - 0.02 * count, 4.21 - 0.02 * count] for count in (1, 3, 5, 10)},
        "adamw": [4.1, 4.12],
        "adamw-one-lr": [4.3, 4.32],
    },
    "ablation": {"sinkgd-paper": [4.0, 4.1], "sign": [4.1, 4.2], "adamw": [4.1, float("inf")]},
    "pareto": {"sinkgd-paper": [4.2, 4.3], "sinkgd": [4.1, 4.15], "adamw": [4.1, float("inf")]},
    "shift": {"sinkgd": [4.2, 4.3], "adamw": [4.1, 4.2]},
    "width": {f"raw-{width}": [4.2, 4.3] for width in (64, 128)} | {"adamw-128": [4.1, 4.2]},
}
OWN = {"pareto": {"state-loss"}, "shift": {"recovery"}, "width": {"loss-by-rate-raw"}}


@pytest.mark.parametrize(
    ("width", "theme"), [pytest.param(1280, "light", marks=pytest.mark.slow), (390, "dark")]
)
@pytest.mark.parametrize(
    "name",
    [name if name == "pareto" else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES],
)
def test_the_page_is_one_request_and_draws_its_charts(browser, tmp_path, name, width, theme):
    study = STUDIES[name]
    record = made_up_record(study, LOSSES[name])
    results = StudyResults.of(record)
    verdict = study.judge(results)
    path = tmp_path / f"{name}.html"
    write_whole(path, study_page(study, record, results, verdict))
    said, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function(
        "[...document.querySelectorAll('.chart')].every((c) => c.querySelector('.main-svg'))"
    )
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    keys = page.evaluate("[...document.querySelectorAll('.chart')].map((c) => c.id)")
    assert {"final", "loss-tokens", "loss-seconds", "grids", "memory"} <= set(keys)
    assert set(keys) & set().union(*OWN.values()) == OWN.get(name, set())
    assert min(page.evaluate(MARKS)) >= 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(CUT_TABLES) == []
    assert page.locator("h1").inner_text() == verdict.headline
    shown = page.locator("main").inner_text()
    assert study.question in shown
    for sentence in (*verdict.sentences, *verdict.cautions):
        assert sentence in shown
    page.close()
