"""The page of a plan in Chromium: one request, both charts drawn, nothing wider than a phone."""

import pytest

from lab.bench.test_page_in_browser import CUT_OFF, MARKS
from sinkgd.lab.disk import write_whole
from sinkgd.lab.plan import Grid, Question, Work, find_architecture, find_device, find_method
from sinkgd.lab.plan.plan_report import answer_lines, plan_page
from sinkgd.lab.plan.planner import make_plan

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("width", "theme"), [pytest.param(1280, "light", marks=pytest.mark.slow), (390, "dark")]
)
def test_the_page_is_one_request_and_draws_its_charts(browser, tmp_path, width, theme):
    question = Question(
        Work(find_architecture("llama-60m"), sequence_length=64),
        Grid(dp_shard=8),
        find_device("rtx-4090"),
        find_method("sinkgd"),
        usable=0.001,  # nothing fits, so the page has to say what to do
        mfu=0.4,
        tokens=1e9,
        price=1.0,
    )
    path = tmp_path / "plan.html"
    answer = make_plan(question, ladder=["llama-60m", "llama-130m"])
    command = "sinkgd plan <b> --mesh.dp-shard 8 --sequence-length 64"
    write_whole(path, plan_page(question, answer, command))
    said, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.main-svg').length >= 4")
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert min(page.evaluate(MARKS)) >= 30
    said_at_the_top = " ".join(page.locator(".verdict").inner_text().split())
    for line in answer_lines(question, answer):
        assert " ".join(line.split()) in said_at_the_top
    assert "--recompute-activations" in said_at_the_top
    assert page.locator("pre code").first.inner_text() == command
    broken = [b for b in page.locator(".word").all() if b.bounding_box()["height"] > 26]
    assert broken == [], "a word of the command stands on two lines"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    page.close()
