"""The calculator in Chromium: the same figures as Python's, badges that follow, no jumps."""

import pytest

from lab.report.synthetic_runs import write_likely_run, write_run
from sinkgd.lab.devices import DEVICES
from sinkgd.lab.report import analyze, build_page, calculator_block, write_page
from sinkgd.lab.report.calculator import amount, signed
from sinkgd.lab.report.cost import (
    STATE_RULES,
    Change,
    Machine,
    assumed_speed,
    changed_cost,
    devices_needed,
    run_cost,
)
from sinkgd.lab.report.shell import from_cdn

pytestmark = pytest.mark.browser

# gpus, price, watts, parameters M, tokens B, share of the peak %, tokens to equal loss %, speed ×
CASES = [
    (8, 2.0, 700, 1339.08, 13.1072, 40, 36, 1.094),
    (1, 0.0, 450, 58.0736, 1.31072, 12.5, 100, 1.0),
    (1024, 3.75, 1000, 405_853, 15_600, 38, 135, 0.87),
    (3, 1.11, 0, 0.935, 0.002, 99, 5, 12),
]
FIELDS = ("gpus", "price", "watts", "parameters", "tokens", "mfu", "fraction", "speedup")
# Fields whose figures have no natural bound: name, label and unit.
UNBOUNDED = (
    ("gpus", "GPUs", ""),
    ("price", "price per GPU", " USD/h"),
    ("watts", "power per GPU", " W"),
    ("parameters", "parameters, N", " M"),
    ("tokens", "tokens", " B"),
    ("speed", "tokens/s per GPU", ""),
    ("fraction", "tokens to the same loss", " %"),
    ("speedup", "relative speed of a step", " ×"),
)
KEYS = ("hours", "gpu_hours", "usd", "kwh")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_likely_run(folder, recipe, 0, steps=200) for recipe in ("adamw", "sinkgd")]


@pytest.fixture(scope="module")
def page(browser, runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    # Without plotly.js, which the calculator does not need: each test loads the page again.
    whole = build_page(runs, baseline="adamw", title="T", command="C")
    path.write_text(from_cdn(whole), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.route("https://**", lambda route: route.abort())
    page.goto(path.as_uri())
    return page


@pytest.fixture
def form(page):
    """The calculator as it is at first."""
    page.reload()
    return page.locator("#calculator")


def put(form, **fields):
    for name, value in fields.items():
        form.locator(f"[name={name}]").fill(str(value))


def choose(form, name, label):
    form.locator(f"[name={name}]").select_option(label=label)


def shown(form, attribute):
    return {
        row.get_attribute("data-outcome"): [
            cell.text_content() if attribute is None else float(cell.get_attribute(attribute))
            for cell in row.locator("td").all()
        ]
        for row in form.locator("[data-outcome]").all()
    }


def badge(form, name):
    return form.locator(f"[data-for={name}]").text_content()


def test_at_first_the_browser_shows_what_python_wrote(form, runs):
    block = calculator_block(analyze(runs, "adamw"))
    for one in block.outcomes:
        words = [amount(one.baseline), amount(one.candidate), signed(one.difference)]
        assert shown(form, None)[one.key] == words
    assert form.locator("output[name=cost]").text_content() == block.sentence
    assert form.locator("output[name=memory]").text_content() == block.memory_sentence
    for one in block.memory:
        cells = form.locator(f"tr[data-memory='{one.rule.method}'] td").all_text_contents()
        assert cells[0] == amount(one.gib)
        assert cells[2] == f"{one.devices:,}"


@pytest.mark.parametrize("case", CASES)
def test_the_browser_computes_what_python_does(form, case):
    put(form, **dict(zip(FIELDS, case, strict=True)))
    gpus, price, watts, parameters, tokens, mfu, fraction, speedup = case
    speed = float(form.locator("[name=speed]").input_value())
    assert speed == pytest.approx(assumed_speed(989.4e12, mfu / 100, parameters * 1e6), rel=5e-4)

    given = Machine(gpus, price, watts), tokens * 1e9, speed
    baseline, candidate = run_cost(*given), changed_cost(*given, Change(fraction / 100, speedup))
    numbers, words = shown(form, "data-value"), shown(form, None)
    for key in KEYS:
        expected = [getattr(baseline, key), getattr(candidate, key)]
        expected.append(expected[1] - expected[0])
        assert numbers[key] == pytest.approx(expected, rel=1e-12)
        assert words[key] == [amount(expected[0]), amount(expected[1]), signed(expected[2])]


def test_a_figure_that_is_typed_is_the_readers_own(form):
    assert badge(form, "fraction") == "measured here"
    put(form, fraction=50, price=3, speed=1234)
    assert [badge(form, name) for name in ("fraction", "price", "speed")] == ["your own"] * 3
    assert form.locator("[name=candidate]").input_value() == "own"
    assert form.locator("[name=speed-source]").input_value() == "own"
    put(form, mfu=80)
    assert form.locator("[name=speed]").input_value() == "1234"  # own figures stay


def test_a_choice_brings_its_figures_and_their_badges(form):
    choose(form, "candidate", "SinkGD, published at 350M")
    assert form.locator("[name=fraction]").input_value() == "41.67"
    assert badge(form, "fraction") == badge(form, "speedup") == "published"
    assert "arXiv 2502.06742" in form.locator("[data-source=candidate]").text_content()

    choose(form, "model", "llama-10b")
    assert [badge(form, name) for name in ("parameters", "tokens")] == ["published", "assumed"]
    choose(form, "device", "B200 SXM")
    assert form.locator("[name=watts]").input_value() == "1000"

    assert (form.locator("[name=price]").input_value(), badge(form, "price")) == ("4", "assumed")


def test_a_speed_of_a_cpu_is_not_offered_for_a_gpu(form):
    sources = form.locator("[name=speed-source] option").all_text_contents()
    assert "measured here" not in sources
    assert (badge(form, "fraction"), badge(form, "speedup")) == ("measured here", "assumed")
    assert form.locator("[name=speedup]").input_value() == "1"


@pytest.mark.parametrize(("device", "offered"), [("H100 SXM", True), ("B200 SXM", False)])
def test_a_measured_speed_stays_with_its_device(browser, tmp_path, device, offered):
    runs = [
        write_run(tmp_path, name, {10: 4.0, 20: 3.0 + i},
                  environment={"device": "NVIDIA H100 80GB HBM3"})
        for i, name in enumerate(("sinkgd", "adamw"))
    ]  # fmt: skip
    write_page(tmp_path / "page.html", runs, baseline="adamw", title="T", command="C")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    form = page.locator("#calculator")
    assert form.locator("[name=speed-source]").input_value() == "measured"
    choose(form, "device", device)
    measured = form.locator("[name=speed-source]").input_value() == "measured"
    assert (measured, badge(form, "speed") == "measured here") == (offered, offered)
    page.close()


@pytest.mark.parametrize(
    "parameters", [70_000, *(pytest.param(p, marks=pytest.mark.slow) for p in (7000, 405_000))]
)
@pytest.mark.parametrize("device", ["h100", "rtx-4090", "mi300x"])
def test_memory_and_devices_are_pythons(form, parameters, device):
    form.locator("[name=device]").select_option(device)
    put(form, parameters=parameters, share=80)
    rows = [
        form.locator(f"tr[data-memory='{rule.method}'] td").all_text_contents()
        for rule in STATE_RULES
    ]
    held = [rule.memory_bytes(1e6 * parameters, 0.8) for rule in STATE_RULES]
    assert [row[0] for row in rows] == [amount(value / 2**30) for value in held]
    memory = DEVICES[device].memory_bytes
    assert [row[2] for row in rows] == [f"{devices_needed(value, memory):,}" for value in held]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tokens", "", "“tokens” has no number; give one."),
        ("gpus", "1.5", "“GPUs” is 1.5; give a whole number."),
        ("gpus", "0", "“GPUs” is 0; give at least 1."),
        ("speed", "-3", "“tokens/s per GPU” is -3; give a number above 0."),
        ("price", "-1", "“price per GPU” is -1 USD/h; give 0 or more."),
        *(
            (name, "1e300", f"“{label}” is 1e300{unit}; give at most 1,000,000,000.")
            for name, label, unit in UNBOUNDED
        ),
        ("mfu", "101", "“share of the peak” is 101 %; give at most 100."),
        ("share", "100.5", "“in hidden matrices” is 100.5 %; give at most 100."),
    ],
)
def test_a_field_that_cannot_be_is_named_and_leaves_no_figure(form, name, value, words):
    put(form, **{name: value})
    assert form.locator(f"[name={name}]").get_attribute("aria-invalid") == "true"
    assert {word for words in shown(form, None).values() for word in words} == {"–"}
    assert form.locator(".problem").text_content() == words
    field = form.locator(".field", has=form.page.locator(f"[name={name}]"))
    assert field.get_attribute("data-problem") == words
    assert form.locator("[data-problem]").count() == 1
    if name == "mfu":  # no speed is computed from a share that cannot be
        assert form.locator("[name=speed]").input_value() == "49260"
    assert set(form.locator("tr[data-memory] td").all_text_contents()) == {"–"}
    assert form.locator("output").all_text_contents() == ["", ""]


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        *((name, "1,5") for name in (*FIELDS, "share", "speed")),
        *(("tokens", typed) for typed in (",5", "1,000", "12,5,", "1.000,5")),
    ],
)
def test_a_number_with_a_comma_is_not_read_as_another(form, name, typed):
    field = form.locator(f"[name={name}]")
    field.press("Control+a")
    field.press_sequentially(typed)
    label = form.locator(f"label[for={field.get_attribute('id')}]").text_content()
    expected = f"“{label}” was given a comma; write 1.5 or 1000, not 1,5 or 1,000."
    assert form.locator(".problem").text_content() == expected
    assert {word for words in shown(form, None).values() for word in words} == {"–"}
    field.press("Control+a")
    field.press_sequentially("1")
    field.press("Control+a")
    field.press_sequentially("20")
    assert form.locator(".problem").text_content() == ""


def test_a_pasted_number_with_a_comma_is_not_read_as_another(form, page):
    page.evaluate("document.body.prepend(document.createElement('textarea'))")
    page.locator("textarea").fill("1,5")
    page.locator("textarea").press("Control+a")
    page.locator("textarea").press("Control+c")
    field = form.locator("[name=tokens]")
    field.press("Control+a")
    field.press("Control+v")
    assert "“tokens” was given a comma" in form.locator(".problem").text_content()
    put(form, tokens="1.5")
    assert form.locator(".problem").text_content() == ""


@pytest.mark.parametrize("typed", ["1.5", "1,000.5"])
def test_a_decimal_point_is_read(form, typed):
    field = form.locator("[name=tokens]")
    field.press("Control+a")
    field.press_sequentially(typed)
    assert field.input_value() == typed.replace(",", "")
    assert form.locator(".problem").text_content() == ""


@pytest.mark.parametrize(("parameters", "devices"), [(1000, "1"), (70_000, "4")])
def test_the_sentence_on_memory_says_when_adamw_needs_no_more_devices(form, parameters, devices):
    put(form, parameters=parameters, share=100)
    words = form.locator("output[name=memory]").text_content()
    rows = form.locator("tr[data-memory]").all()
    adamw = rows[0].locator("td").all_text_contents()[2]
    end = ", as AdamW does." if devices == adamw else f" instead of {adamw}."
    assert words.endswith(f"and needs {devices} × H100 SXM{end}")


def test_nothing_moves_when_figures_change_and_everything_can_be_reached_by_keys(form, page):
    boxes = "form => [...form.querySelectorAll('fieldset, input, table')].map(n => n.offsetTop)"
    before = form.evaluate(boxes)
    put(form, tokens=0.002, price=3, fraction=50)
    choose(form, "speed-source", "published, Adam at 1.3B")
    assert form.evaluate(boxes) == before

    form.locator("[name=device]").focus()
    reached = []
    for _ in range(14):
        reached.append(page.evaluate("document.activeElement.name"))
        page.keyboard.press("Tab")
    selects = {"device", "model", "speed-source", "candidate"}
    assert set(reached) == {*FIELDS, "share", "speed", *selects}
