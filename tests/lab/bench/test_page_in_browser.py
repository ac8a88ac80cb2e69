"""The pages in Chromium, from the disk: one request, charts drawn, nothing wider than a phone."""

import pytest

from lab.bench.synthetic import kernels_record, memory_record, step_record, workload
from sinkgd.lab.bench.bench_kernels import kernels_page
from sinkgd.lab.bench.memory_report import memory_page
from sinkgd.lab.bench.step_record import evaluate
from sinkgd.lab.bench.step_report import step_page
from sinkgd.lab.disk import write_whole

pytestmark = pytest.mark.browser

MARKS = """() => [...document.querySelectorAll(".chart")].map((chart) =>
    [...chart.querySelectorAll(".scatterlayer .point, .barlayer .point path")].length)"""
CUT_OFF = """() => [...document.querySelectorAll(".chart")].flatMap((chart) => {
    const frame = chart.getBoundingClientRect();
    return [...chart.querySelectorAll("svg text")].filter((text) => {
        const box = text.getBoundingClientRect();
        return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1
            || box.top < frame.top - 1);
    }).map((text) => `${chart.id}: ${text.textContent}`);
})"""

CUT_TABLES = """() => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    return [...document.querySelectorAll(".scroll")]
        .filter((frame) => frame.querySelector(".text-table"))
        .filter((frame) => frame.scrollWidth > frame.clientWidth + 1)
        .map((frame) => `${frame.ariaLabel}: ${frame.scrollWidth} in ${frame.clientWidth}`);
}"""


def made_page(name):
    if name == "memory":
        return memory_page(memory_record())
    if name == "kernels":
        return kernels_page(kernels_record())
    record = step_record(workload(), workload("llama-60m"), workload("llama-60m", "bfloat16"))
    return step_page(step_record(*record.workloads, targets=evaluate(record)))


@pytest.mark.parametrize(
    ("width", "theme"), [pytest.param(1280, "light", marks=pytest.mark.slow), (390, "dark")]
)
@pytest.mark.parametrize(("name", "charts"), [("step", 2), ("memory", 2), ("kernels", 4)])
def test_a_page_is_one_request_and_draws_its_charts(browser, tmp_path, name, charts, width, theme):
    path = tmp_path / f"{name}.html"
    write_whole(path, made_page(name))
    said, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    drawn = f"document.querySelectorAll('.main-svg').length >= {2 * charts}"
    page.wait_for_function(drawn)
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    marks = page.evaluate(MARKS)
    assert len(marks) == charts
    assert min(marks) >= 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(CUT_TABLES) == []
    page.close()
