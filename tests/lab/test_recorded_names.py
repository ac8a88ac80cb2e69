"""One name, one recipe; records from before the renaming keep their meaning."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sinkgd
from sinkgd.lab.cli import main
from sinkgd.lab.commands.bench.memory import Memory
from sinkgd.lab.commands.compare import Compare
from sinkgd.lab.commands.plan import Plan
from sinkgd.lab.experiments.studies import QUESTIONS, find_study
from sinkgd.lab.experiments.studies.scale import is_on_paper, read_fits
from sinkgd.lab.experiments.study_record import StudyRecord
from sinkgd.lab.models import build_model
from sinkgd.lab.plan import METHODS
from sinkgd.lab.recorded_names import NAMING, command_now, name_now, recipe_now, start_now
from sinkgd.lab.results import Run
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import RECIPES, build_optimizer, resolve_optimizer
from sinkgd.optim.partition import DEFLATED_RANK

ROOT = Path(__file__).parents[2]
STUDIES = sorted(ROOT.glob("benchmarks/studies/*/study.jsonl"))
RUNS = sorted(ROOT.glob("benchmarks/demo/2026-11-26/*.jsonl")) + sorted(
    ROOT.glob("benchmarks/learning_rates/2026-11-26-*.jsonl")
)


def of_recipe(name, model, **options):
    return build_optimizer(model, resolve_optimizer(OptimizerConfig(recipe=name, **options)))


def options_of(optimizer):
    """Return the groups' options and names, without the rate that the laboratory adds."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("preset", ["llama-nano", "gpt2-nano"])
def test_the_recipe_sinkgd_is_the_apis_default_to_the_option(preset):
    model = build_model(preset, vocab_size=64, max_sequence_length=16)
    api = sinkgd.SinkGD(sinkgd.param_groups(model))
    assert options_of(of_recipe("sinkgd", model)) == options_of(api)
    assert api.param_groups[0]["deflated_rank"] == DEFLATED_RANK > 0


def test_the_recipe_sinkgd_paper_is_the_api_without_deflation():
    model = build_model("llama-nano", vocab_size=64, max_sequence_length=16)
    defaults = RECIPES["sinkgd-paper"].defaults
    scale = defaults["matrix_lr"] / defaults["lr"]
    groups = sinkgd.param_groups(model, matrix_lr_scale=scale, deflated_rank=0)
    assert options_of(of_recipe("sinkgd-paper", model)) == options_of(sinkgd.SinkGD(groups))


def test_both_take_the_same_steps_as_the_api():
    def stepped(build):
        torch.manual_seed(0)
        model = build_model("llama-nano", vocab_size=64, max_sequence_length=16)
        optimizer = build(model)
        tokens = torch.arange(16).unsqueeze(0)
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    ours = stepped(lambda model: of_recipe("sinkgd", model))
    theirs = stepped(lambda model: sinkgd.SinkGD(sinkgd.param_groups(model)))
    assert all(map(torch.equal, ours, theirs))


def test_the_name_means_the_default_in_every_command():
    assert OptimizerConfig().recipe == "sinkgd"
    assert Plan().optimizer == "sinkgd"
    assert Compare().optimizers.split(",")[:2] == ["sinkgd", "sinkgd-paper"]
    assert "sinkgd" in Memory().training.recipes.split(",")
    assert METHODS["sinkgd"].directions == RECIPES["sinkgd"].defaults["deflated_rank"]
    assert METHODS["sinkgd-paper"].directions == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--optimizer.recipe", "deflated"],
        ["compare", "--optimizers", "deflated,adamw"],
        ["plan", "--optimizer", "deflated"],
        ["experiment", "table1", "--optimizer", "deflated"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_old_name_is_refused_with_the_new_one(arguments, capsys, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    assert main([*arguments, *out]) == 2
    assert "'deflated'; it is called 'sinkgd' now" in capsys.readouterr().err


def arms_now(study):
    return {arm.name: arm for arm in find_study(study).settings["machine"].arms}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_a_recorded_study_is_read_under_the_names_of_now(path):
    if is_on_paper(path):
        _, fits = read_fits(path)
        assert "sinkgd" not in {fit.method for fit in fits}
        assert METHODS["sinkgd-paper"].title in {fit.title for fit in fits}
        return
    record = StudyRecord.read(path)
    known = arms_now(record.plan["study"])
    for name, arm in record.plan["arms"].items():
        assert arm["overrides"] == dict(known[name].overrides)
        assert arm["series"] == known[name].series
    for result in record.runs.values():
        config = result.run.start.config["optimizer"]
        rank = config.get("deflated_rank") or 0
        assert result.arm in record.plan["arms"]
        assert result.name.startswith(f"{result.arm}-")
        if result.run.start.recipe in ("sinkgd", "sinkgd-paper"):
            assert config["recipe"] == result.run.start.recipe
            assert (rank > 0) is (result.run.start.recipe == "sinkgd")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recorded_run_is_read_under_the_names_of_now(path):
    raw = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    start = Run.read(path).start
    assert start.recipe == {"sinkgd": "sinkgd-paper", "deflated": "sinkgd"}.get(
        raw["recipe"], raw["recipe"]
    )
    assert start.config["optimizer"]["recipe"] == start.recipe
    assert start.naming == NAMING
    words = start.command.split()
    assert words[words.index("--optimizer.recipe") + 1] == start.recipe


def test_what_is_written_now_is_not_translated(tmp_path):
    start = Run.read(RUNS[0]).start
    assert asdict(start) == start_now(asdict(start))
    for name in ("sinkgd", "sinkgd-paper", "sinkgd-seed0"):
        assert recipe_now(name, NAMING) == name_now(name, NAMING) == name


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("sinkgd", "sinkgd-paper"),
        ("deflated", "sinkgd"),
        ("sinkgd-seed1", "sinkgd-paper-seed1"),
        ("sinkgd-tune-lr0.08", "sinkgd-paper-tune-lr0.08"),
        ("sinkgd-batch4", "sinkgd-paper-batch4"),
        ("deflated-batch4-seed1", "sinkgd-batch4-seed1"),
        ("alpha0.05", "sinkgd-paper-alpha0.05"),
        ("deflated-alpha0.05", "sinkgd-alpha0.05"),
        ("deflated-64", "sinkgd-64"),
        ("sinkgd-pinned-seed0", "sinkgd-pinned-seed0"),
        ("sinkgd-stateless-seed0", "sinkgd-stateless-seed0"),
        ("sinkgd-tables", "sinkgd-tables"),
        ("sinkgd-table-tables", "sinkgd-table-tables"),
        ("raw-64", "raw-64"),
        ("adamw", "adamw"),
        ("alphabet", "alphabet"),
    ],
)
def test_names_of_arms_and_runs(before, now):
    assert name_now(before, 1) == now


@pytest.mark.parametrize(
    ("before", "recipe", "now"),
    [
        (
            "sinkgd train --out runs/deflated-seed0 --optimizer.recipe deflated",
            "sinkgd",
            "sinkgd train --out runs/sinkgd-seed0 --optimizer.recipe sinkgd",
        ),
        (
            "sinkgd train --out runs/a --optimizer.lr 0.1",
            "sinkgd-paper",
            "sinkgd train --out runs/a --optimizer.lr 0.1 --optimizer.recipe sinkgd-paper",
        ),
        (
            "sinkgd experiment table1 --optimizer sinkgd,deflated,adamw",
            None,
            "sinkgd experiment table1 --optimizer sinkgd-paper,sinkgd,adamw",
        ),
    ],
)
def test_commands(before, recipe, now):
    assert command_now(before, 1, recipe) == now
    assert command_now(before, NAMING, recipe) == before


def test_every_study_names_recipes_that_there_are():
    for name in QUESTIONS:
        settings = getattr(find_study(name), "settings", {}) if name != "scale" else {}
        for setting in settings.values():
            assert {arm.recipe for arm in setting.arms} <= set(RECIPES)
