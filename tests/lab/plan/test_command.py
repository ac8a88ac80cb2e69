"""`sinkgd plan`: one JSON object or tables, a page, and errors that name the option."""

import json

import pytest

from sinkgd.lab.cli import main
from sinkgd.lab.commands.plan import Plan
from sinkgd.lab.plan import METHODS
from sinkgd.lab.plan.planner import USUAL_METHODS
from sinkgd.lab.train.config import MeshConfig

QUICK = ["--sequence-length", "64"]
pytestmark = pytest.mark.usefixtures("short_ladder")


def test_json_is_one_object_with_the_published_figure(capsys):
    assert main(["plan", "--model", "llama-60m", "--optimizer", "sinkgd", "--json", *QUICK]) == 0
    record = json.loads(capsys.readouterr().out)
    assert f"{record['weights_plus_state_gib']:.3f}" == "0.230"
    assert record["work"]["precision"] == "bf16"
    assert record["fits"] is True
    assert [one["name"] for one in record["methods"]][:2] == ["sinkgd", "sinkgd-paper"]
    adamw = next(one for one in record["methods"] if one["name"] == "adamw")
    assert f"{adamw['weights_plus_state_gib']:.3f}" == "0.325"
    assert record["cost"] is None
    assert record["assumed"]["tokens"] == 20 * record["parameters"]


def test_the_terminal_says_what_it_means(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    options = ["--model", "llama-7b", "--optimizer", "adamw", "--device", "rtx-4090", *QUICK]
    assert main(["plan", *options]) == 0
    shown = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert "llama-7b with AdamW peaks at 50.2 GiB in all and does not fit into the 21.6" in shown
    assert "weights, gradients and state are 50.2 GiB of it." in shown
    (adamw,) = [line.split() for line in shown.splitlines() if line.startswith("AdamW   ")][-1:]
    assert adamw[1] == "0.433"  # llama-60m: weights, gradients and state
    assert adamw[2].startswith("(")  # llama-3-8b


@pytest.mark.slow
def test_a_mesh_of_sixteen_thousand_ranks_is_planned_with_cost_and_page(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("COLUMNS", "300")
    mesh = ["--mesh.dp-replicate", "2", "--mesh.dp-shard", "1024", "--mesh.tp", "8"]
    options = ["--model", "llama-3-405b", "--price-per-gpu-hour", "2", "--out", str(tmp_path)]
    assert main(["plan", *options, *mesh, *QUICK]) == 0
    shown = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert "16,384 × H100 SXM" in shown
    assert "SinkGD: sums of rows and columns" in shown
    record = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert record["mesh"]["ranks"] == 16_384
    given = ["--model llama-3-405b", *mesh, *QUICK, f"--price-per-gpu-hour 2.0 --out {tmp_path}"]
    assert record["command"] == f"sinkgd plan {' '.join(given)}"
    hours = record["days"] * 24 * 16_384
    assert record["cost"] == pytest.approx(2 * hours)
    assert "llama-3-405b with SinkGD" in (tmp_path / "plan.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "lama-7b"], 2, "model is 'lama-7b'; did you mean 'llama-7b'?"),
        (["--optimizer", "sinkdg"], 2, "optimizer is 'sinkdg'; did you mean 'sinkgd'?"),
        (["--device", "h300"], 2, "device is 'h300'; did you mean"),
        (["--batch-size", "0"], 2, "batch_size is 0; it must be at least 1"),
        (
            ["--optimizer", "sinkgd-cross-fit"],
            2,
            "micro_batches is 1, and a step of",
        ),
        (["--mfu", "1.5"], 2, "mfu is 1.5; it must be above 0 and at most 1"),
        (["--tokens", "0"], 2, "tokens is 0.0; it must be above 0"),
        (["--mesh.dp-shard", "0"], 2, "mesh.dp_shard is 0; it must be at least 1"),
        (["--mesh.tp", "3"], 2, "mesh.tp is 3, which does not divide the 32 attention heads"),
        (
            ["--optimizer", "adamw", "--release-gradients"],
            2,
            "release_gradients needs an optimizer that can take one gradient at a time; 'adamw'",
        ),
    ],
)
def test_errors_name_the_option_the_value_and_the_remedy(capsys, arguments, code, message):
    assert main(["plan", *arguments]) == code
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_help_teaches(capsys):
    assert main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "sinkgd plan --model llama-7b --optimizer adamw" in shown.partition("For example:")[2]
    assert "--mesh.dp-replicate" in shown


def test_the_command_repeats_what_was_given():
    options = Plan(mesh=MeshConfig(tp=2), recompute_activations=True, mfu=0.5)
    expected = "sinkgd plan --mesh.tp 2 --recompute-activations --mfu 0.5"
    assert options._command() == expected
    assert Plan()._command() == "sinkgd plan"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("every", [[], ["--all"]])
def test_the_answer_comes_first_and_no_table_is_wider_than_the_terminal(
    capsys, monkeypatch, width, every
):
    monkeypatch.setenv("COLUMNS", str(width))
    options = ["--model", "llama-7b", "--device", "rtx-4090", "--mesh.dp-shard", "2"]
    assert main(["plan", *options, *every, *QUICK]) == 0
    shown = capsys.readouterr()
    lines = shown.out.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    first = " ".join(line.strip() for line in lines[:5])
    assert "llama-7b with SinkGD FITS on 2 × RTX 4090;" in first
    assert "it needs at least 2, AdamW at least 4." in first
    assert "Methods that fit on 2 × RTX 4090: SinkGD; SinkGD as in the paper" in first
    assert max(map(len, lines[:-1])) <= width  # the last line is prose, which terminals wrap
    peaks = [line for line in lines if line.startswith("GaLore ")]
    assert bool(peaks) == bool(every)
    with_one_micro_batch = [own for own in METHODS.values() if own.least_micro_batches == 1]
    assert len(with_one_micro_batch) == len(METHODS) - 1
    count = len(with_one_micro_batch) if every else 6
    assert f"({count}/{count})" in shown.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "needed", "remedy"),
    [
        ([], "it needs at least 2, AdamW at least 4.", "To fit, use --mesh.dp-shard 2, or lower"),
        (
            ["--mesh.dp-replicate", "2"],
            "it needs at least 2, AdamW at least 4.",
            "To fit, use --mesh.dp-shard 2, or lower",
        ),
        (
            ["--batch-size", "1024"],
            "it needs more than 1,024, as AdamW does.",
            "of activations and logits on each device. To lower the peak, try",
        ),
        (
            ["--batch-size", "2048", "--mesh.tp", "2", "--recompute-activations"],
            "it needs more than 2,048, as AdamW does.",
            "To lower the peak, try --loss-chunk-tokens 128, --release-gradients, a smaller",
        ),
    ],
    ids=["one device", "replicas", "no number of shards", "options in use are not named"],
)
def test_what_does_not_fit_is_told_how_to(capsys, monkeypatch, options, needed, remedy):
    monkeypatch.setenv("COLUMNS", "400")
    fixed = ["--model", "llama-7b", "--device", "rtx-4090"]
    assert main(["plan", *fixed, *options, *QUICK]) == 0
    shown = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert "llama-7b with SinkGD DOES NOT FIT on" in shown
    assert needed in shown
    assert remedy in shown
    if "--recompute-activations" in options:
        assert "--recompute-activations" not in shown


@pytest.mark.parametrize(
    ("method", "end"), [("sinkgd", "at least 1, as AdamW does."), ("adamw", "at least 1.")]
)
def test_the_answer_names_adamw_where_it_says_more(capsys, method, end):
    options = ["--model", "llama-60m", "--optimizer", method]
    assert main(["plan", *options, *QUICK]) == 0
    first = " ".join(capsys.readouterr().out.partition("Methods")[0].split())
    assert first.endswith(f"FITS on 1 × H100 SXM; it needs {end}")


def test_the_asked_method_is_shown_though_it_is_none_of_the_six(capsys):
    assert main(["plan", "--model", "llama-60m", "--optimizer", "galore", "--json", *QUICK]) == 0
    names = [one["name"] for one in json.loads(capsys.readouterr().out)["methods"]]
    assert set(names) == {*USUAL_METHODS, "galore"}


@pytest.mark.parametrize("method", ["sinkgd", "adamw"])
def test_it_fits_on_the_fewest_devices_and_on_no_fewer(capsys, method):
    def plan_on(shards):
        options = ["--model", "llama-7b", "--device", "rtx-4090", "--optimizer", method, "--json"]
        assert main(["plan", *options, "--mesh.dp-shard", str(shards), *QUICK]) == 0
        return json.loads(capsys.readouterr().out)["fits"]

    fewest = {"sinkgd": 2, "adamw": 4}[method]
    assert (plan_on(fewest), plan_on(fewest // 2)) == (True, False)
