"""The page is one file that carries everything, says what is so, and trusts no string of a run."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sinkgd.lab.report
from lab.report.synthetic_runs import write_likely_run, write_run
from sinkgd.lab.commands.report import Report
from sinkgd.lab.report import ReportError, analyze, build_page, write_page
from sinkgd.lab.report.bar_charts import bar_charts
from sinkgd.lab.report.figures import identify
from sinkgd.lab.report.line_charts import mean_validation_curve, training_curve
from sinkgd.lab.report.measurement_page import stacked_bars
from sinkgd.lab.report.page import compare_settings
from sinkgd.lab.results import Memory, ResultsError

PUBLISHED = {f"published-llama-{size}" for size in ("60m", "130m", "350m", "1b")}
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 & 'x' \"y\" {{ 7*7 }}"


class Parsed(HTMLParser):
    """Scripts, text outside of them and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.text, self.tags = [], "", []
        self._inside = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def build(runs, baseline="adamw", **options):
    return build_page(runs, baseline=baseline, **{"title": "T", "command": "C", **options})


def figures(page):
    return json.loads(Parsed(page).scripts[0])


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0}), write_run(tmp_path, "sgd", {20: 4.5})]


def test_the_page_has_the_verdict_the_figures_and_the_command(runs):
    page = Parsed(build(runs, title="A title", command="sinkgd compare --seeds 1"))
    assert "sgd did not reach adamw’s final loss of 4.000." in page.text
    assert "A title" in page.text
    assert "sinkgd compare --seeds 1" in page.text
    assert {tag["id"] for _, tag in page.tags if tag.get("class") == "chart"} == {
        "loss-tokens",
        "loss-seconds",
        "tokens-to-reach",
        "throughput",
        "memory",
        "peak-memory",
        "step-time",
        *PUBLISHED,
    }


def test_every_chart_has_words_for_who_cannot_see_it(runs):
    charts = [tag for _, tag in Parsed(build(runs)).tags if tag.get("class") == "chart"]
    labels = {chart["id"]: chart["aria-label"].replace("\xa0", " ") for chart in charts}
    assert all(chart["role"] == "img" for chart in charts)
    assert labels["tokens-to-reach"] == "Tokens needed: adamw 100 %; sgd not reached."
    assert "adamw ends at 4.000, sgd ends at 4.500" in labels["loss-tokens"]


def test_nothing_but_plotly_and_links_to_papers_names_an_outside_address(runs):
    page = build(runs)
    rest = page.replace(Parsed(page).scripts[1], "")
    rest = re.sub(r'(<a [^>]*href=")https://arxiv\.org/abs/\d{4}\.\d{4,5}"', r"\1", rest)
    assert not re.search(r"https?:|//[a-z]+\.", rest.replace("</", "<"))
    assert page.count("plotly.js v") == 1
    assert "default-src 'none'" in page


def test_hostile_strings_stay_text(tmp_path):
    baseline = write_run(tmp_path, "adamw", {20: 4.0})
    hostile = write_run(
        tmp_path,
        HOSTILE,
        {20: 3.0},
        name=HOSTILE,
        command=HOSTILE,
        config={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
    )
    failed = write_run(tmp_path, HOSTILE, {5: 9.0}, status="failed", message=HOSTILE)
    raw = build([baseline, hostile, failed], title=HOSTILE, command=HOSTILE)
    page = Parsed(raw)
    assert len(page.scripts) == 3
    assert "alert(1)</script>" not in raw
    assert page.text.count(HOSTILE) >= 10
    assert "49" not in page.text.split("In numbers")[0]  # {{ 7*7 }} is no template
    names = [trace["name"] for trace in figures(raw)["loss-tokens"]["data"] if "name" in trace]
    assert names[0] == "adamw"
    assert "<" not in names[1]  # plotly reads tags in its texts


def test_unfinished_and_failed_runs_are_shown(tmp_path, runs):
    runs.append(write_run(tmp_path, "sgd", {5: 9.0}, status="failed", message="disk full"))
    runs.append(write_run(tmp_path, "live", {7: 6.0}, status=None))
    text = Parsed(build(runs)).text
    assert "sgd-seed0 failed at step 5 and is in no average: disk full" in text
    assert "live-seed0 is unfinished at step 7" in text
    assert re.search(r"live-seed0\s+unfinished\s+7\s+700", text)


@pytest.mark.parametrize("baseline", ["adamw", None])
def test_a_single_run_makes_a_page(tmp_path, baseline):
    page = build([write_run(tmp_path, "adamw", {20: 4.0})], baseline)
    assert set(figures(page)) == {
        "loss-tokens",
        "loss-seconds",
        "memory",
        "peak-memory",
        "step-time",
        *PUBLISHED,
    }


@pytest.mark.parametrize("status", [None, "failed", "finished"])
def test_a_run_that_did_nothing_makes_a_page(tmp_path, status):
    build([write_run(tmp_path, "adamw", {}, status=status)])


def test_losses_that_are_no_number_leave_a_gap(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {20: 4.0}),
        write_run(tmp_path, "sgd", {10: 5.0, 15: math.nan, 20: math.inf}),
    ]
    page = build(runs)
    drawn = [trace["y"] for trace in figures(page)["loss-tokens"]["data"]]
    assert [5.0, None, None] in drawn
    assert "its final loss is not a finite number" in Parsed(page).text


def test_the_mean_over_seeds_is_at_the_steps_that_all_have(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0}),
        write_run(tmp_path, "adamw", {5: 7.0, 10: 6.0, 20: 3.0}, seed=1, step_seconds=2.0),
    ]
    curve = mean_validation_curve(runs, "seconds")
    assert curve.x == (15.0, 30.0)
    assert curve.y == (5.5, 3.5)


def test_a_training_curve_is_smooth_short_and_ends_where_the_run_ends(tmp_path):
    run = write_likely_run(tmp_path, "adamw", 0, steps=1000)
    curve = training_curve(run, "tokens")
    assert len(curve.x) == 200
    assert curve.x[-1] == run.steps[-1].tokens
    raw = [row.loss for row in run.steps[-100:]]
    assert max(curve.y[-20:]) - min(curve.y[-20:]) < 0.5 * (max(raw) - min(raw))


def test_a_recipe_keeps_its_color_in_every_chart(runs):
    analysis = analyze(runs, "adamw")
    identities = identify(analysis)
    assert [identity.color for identity in identities.values()] == ["@series-0", "@series-1"]
    for chart in bar_charts(analysis, identities):
        bars = [t for t in chart.figure["data"] if t["type"] == "bar" and "name" not in t]
        for trace in bars:
            assert [c.split(":")[0] for c in trace["marker"]["color"]] == ["@series-0", "@series-1"]


@pytest.mark.parametrize("baseline", [None, "recipe-00"])
def test_no_two_of_up_to_25_recipes_look_alike(tmp_path, baseline):
    runs = [write_run(tmp_path, f"recipe-{i:02}", {2: 4.0}) for i in range(25 if baseline else 24)]
    looks = identify(analyze(runs, baseline)).values()
    assert len({(look.series, look.symbol) for look in looks}) == len(runs)


def test_settings_are_sorted_by_whether_all_share_them(runs):
    settings = compare_settings(analyze(runs, "adamw"), lambda run: run.start.config)
    assert settings.shared == (("seed", "0"), ("model.preset", "llama-nano"))
    assert settings.differing == (("recipe", ("adamw", "sgd")),)


def test_the_page_appears_whole_or_not_at_all(tmp_path, runs, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_page(path, runs, baseline="adamw", title="first", command="C")
    first = path.read_text(encoding="utf-8")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_page(path, runs, baseline="adamw", title="second", command="C")
    assert path.read_text(encoding="utf-8") == first
    assert list(path.parent.iterdir()) == [path]


def test_the_command_prints_the_table_and_the_path(tmp_path, runs, capsys):
    assert Report(tmp_path).run() == 0
    printed = capsys.readouterr().out
    assert "adamw (baseline)" in printed
    assert re.search(r"Tokens to reach +2\.00k \(100\s%\) +not reached", printed)
    assert f"page: {tmp_path / 'report.html'}" in printed
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_command_takes_a_baseline_and_a_path(tmp_path, runs, capsys):
    Report(tmp_path, baseline="sgd", out=tmp_path / "page.html").run()
    assert "sgd (baseline)" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "--baseline sgd" in re.sub(r"<[^>]+>", "", page)


def test_the_command_refuses_an_empty_folder_and_a_damaged_file(tmp_path):
    with pytest.raises(ReportError, match="holds no runs"):
        Report(tmp_path).run()
    run = write_run(tmp_path, "adamw", {5: 4.0})
    with run.path.open("a") as file:
        file.write("damaged\n")
    with pytest.raises(ResultsError, match=r"run\.jsonl:9 is not a record"):
        Report(tmp_path).run()


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colors_stand_out_from_the_card(theme):
    css = (Path(sinkgd.lab.report.__file__).parent / "page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    colors = {name: pair[theme] for name, *pair in pairs}
    # WCAG 2.1: 4.5 for text, 3 for graphics.
    least = {"ink": 4.5, "soft": 4.5, "accent": 4.5, "caution": 4.5, "good": 4.5}
    least |= {f"series-{i}": 3.0 for i in range(9)}
    for name, ratio in least.items():
        for ground in ("card", "paper") if ratio > 3 else ("card",):
            assert contrast(colors[name], colors[ground]) >= ratio, f"{name} on {ground}"
    assert contrast(colors["ink"], colors["caution-paper"]) >= 4.5


def contrast(first, second):
    """WCAG's contrast ratio of two sRGB colors."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_in_two_lines_have_room_between_the_bars(tmp_path):
    names = ["adamw", "sinkgd", "sinkgd-with-a-long-name"]
    runs = [write_run(tmp_path, name, {10: 5.0, 20: 4.0}) for name in names]
    analysis = analyze(runs, "adamw")
    figures = [chart.figure for chart in bar_charts(analysis, identify(analysis))]
    figures.append(stacked_bars(names, ["21.8 GiB, does not fit"] * 3, [("state", 1.0, [1, 2, 3])]))
    tokens, throughput = figures[:2]
    assert tokens["layout"]["height"] == throughput["layout"]["height"]  # they stand side by side
    wrapped = 0
    for figure in figures:
        row = (figure["layout"]["height"] - 120) / len(names)  # the rest is for axis and legend
        bars = [bar for bar in figure["data"] if bar["type"] == "bar" and "width" in bar]
        ends = [y + bar["width"] / 2 for bar in bars for y in bar["y"]]
        for words in figure["layout"]["annotations"][1:]:
            room = row * (words["y"] - max(end for end in ends if end < words["y"]))
            lines = 1 + words["text"].count("<br>")
            assert room > 18 * lines, words["text"]
            wrapped += lines > 1
    assert wrapped >= 2


@pytest.mark.parametrize(("scale", "unit"), [(1, "KiB"), (2**10, "MiB"), (2**20, "GiB")])
def test_bars_have_the_unit_of_their_words(runs, scale, unit):
    memory = Memory(*(scale * 2**10 * size for size in (2, 2, 4, 9)))
    analysis = analyze(runs, "adamw")
    recipes = tuple(replace(recipe, memory=memory) for recipe in analysis.recipes)
    charts = bar_charts(replace(analysis, recipes=recipes), identify(analysis))
    figures = {chart.key: chart.figure for chart in charts}
    for key, expected in (("memory", 8), ("peak-memory", 9)):
        layout = figures[key]["layout"]
        assert layout["xaxis"]["title"]["text"] == unit
        assert layout["annotations"][0]["text"].endswith(f"\xa0{unit}")
        assert sum(bar["x"][0] or 0 for bar in figures[key]["data"]) == expected
    assert figures["step-time"]["layout"]["xaxis"]["title"]["text"] == "seconds"


def test_tokens_have_no_bar_if_only_some_runs_reached_the_loss(tmp_path):
    runs = [write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0}, seed=seed) for seed in (0, 1)]
    runs += [write_run(tmp_path, "sinkgd", {10: 4.5, 20: end}, seed=i)
             for i, end in enumerate((3.9, 4.1))]  # fmt: skip
    analysis = analyze(runs, "adamw")
    chart = bar_charts(analysis, identify(analysis))[0]
    assert chart.description.endswith("sinkgd reached in 1 of 2 runs.")
    assert chart.figure["data"][0]["x"] == [100.0, 0.0]
