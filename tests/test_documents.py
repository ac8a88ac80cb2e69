"""README and docs: blocks run, commands are read, links lead to files, numbers are recorded."""

import json
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from statistics import mean, median

import pytest
import torch

from document_blocks import FENCE, PAGES, ROOT, Snippet, snippets
from exports import NAMES
from sinkgd.lab.bench.interleaved import quartiles, ratios

RECORDED = ROOT / "benchmarks/demo/2026-11-28/sinkgd-seed0.jsonl"

INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def prose_of(page):
    """Return a page's text on one line, so that it does not matter how lines are wrapped."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def commands():
    """List the `sinkgd` command lines of all pages, in blocks and in running text."""
    lines = []
    for place, block in snippets("bash"):
        lines += [Snippet(place, line) for line in block.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        lines += [Snippet(page.name, " ".join(code.split())) for code in INLINE.findall(prose)]
    program = re.compile(r"(?:sinkgd|torchrun .* -m sinkgd\.lab) (?!COMMAND)(?=\w|-)(.*)")
    found = ((place, program.fullmatch(line.strip())) for place, line in lines)
    return list(dict.fromkeys(Snippet(place, match[1]) for place, match in found if match))


def parameters(found):
    return [pytest.param(s.text, id=f"{s.place}-{i}") for i, s in enumerate(found)]


@pytest.fixture
def folder_after_a_demo(tmp_path, monkeypatch):
    """A working directory in which `make demo` has run, and which has a file of options."""
    recorded = tmp_path / "runs/demo/sinkgd-seed0/run.jsonl"
    recorded.parent.mkdir(parents=True)
    recorded.write_bytes(RECORDED.read_bytes())
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "run.toml").write_text("[training]\nsteps = 2\n")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def as_one_rank(monkeypatch):
    """The environment that torchrun gives to the only rank of a run; port 0 is any free one."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (rank | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if (state := sys.modules.get("accelerate.state")) is not None:  # it would go on as a rank
        state.AcceleratorState._reset_state(reset_partial_state=True)


def test_every_block_has_a_known_language():
    known = ("python", "bash", "text")
    assert snippets("", "py", "toml", "sh", "console") == []
    fences = sum(page.read_text(encoding="utf-8").count("\n```") for page in PAGES)
    assert 2 * len(snippets(*known)) == fences


@pytest.mark.parametrize("block", parameters(snippets("python")))
@pytest.mark.usefixtures("folder_after_a_demo", "as_one_rank")
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*pin_memory",
    "ignore:OMP_NUM_THREADS",
    # Said by trainers of what they use themselves.
    "ignore:.*gradient_checkpointing:FutureWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
)
def test_every_python_block_runs_by_itself(block):
    for module in ("transformers", "accelerate", "trl", "peft", "lightning"):
        if f"import {module}" in block or f"from {module}" in block:
            pytest.importorskip(module, reason="pip install '.[trainers]'")
    for module in ("llamafactory", "torchtitan"):
        if f"from {module}" in block:
            reason = f"tests/integrations/pins has the versions of {module} that work"
            pytest.importorskip(module, reason=reason, exc_type=ImportError)
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("line", parameters(commands()))
@pytest.mark.usefixtures("folder_after_a_demo")
def test_every_command_line_is_read(line, monkeypatch, capsys):
    cli = pytest.importorskip("sinkgd.lab.cli")
    recipes = import_module("sinkgd.lab.train.recipes").RECIPES
    arguments = shlex.split(line, comments=True)
    read = []
    if arguments and arguments[0] in cli.COMMANDS:
        module, name = arguments[0], cli.COMMANDS[arguments[0]][0]
        if name is None and len(arguments) > 1:
            name = import_module(f"sinkgd.lab.commands.{module}").COMMANDS[arguments[1]][0]
            module = f"{module}.{arguments[1]}"
        if name is not None:
            command = getattr(import_module(f"sinkgd.lab.commands.{module}"), name)
            monkeypatch.setattr(command, "run", lambda self: read.append(self) or 0)
    assert cli.main(arguments) == 0, capsys.readouterr().err
    for command in read:
        named = getattr(command, "optimizers", None) or ""
        assert set(named.split(",")) - {""} <= set(recipes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    gone = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    assert gone == []


LIBRARY = [
    file
    for file in sorted((ROOT / "src/sinkgd").rglob("*.py"))
    if "lab" not in file.relative_to(ROOT / "src/sinkgd").parts
]


@pytest.mark.parametrize("page", [*PAGES, *LIBRARY], ids=lambda page: page.name)
def test_nothing_is_installed_from_a_registry_that_lacks_the_package(page):
    assert not re.search(r"pip\s+install\s+['\"]?sinkgd", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_recipe_deflated(page):
    """The recipe is `sinkgd`; `deflated` remains a contender of `sinkgd bench step`."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"`deflated`|(?:recipe|optimizers?)[ =]\S*\bdeflated\b", text)


def table_after(page, heading):
    """Return a table as {first cell: other cells}, without backticks and bold."""
    text = (ROOT / page).read_text(encoding="utf-8")
    body = text[text.index(heading) :].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in body.splitlines()]
    cells = [[cell.strip().strip("*`") for cell in row] for row in rows]
    return {row[0]: row[1:] for row in cells if not set(row[0]) <= set("-") or not row[0]}


def test_the_demo_of_the_readme_is_the_recorded_one(tmp_path, capsys, monkeypatch):
    results = import_module("sinkgd.lab.results")
    monkeypatch.setenv("COLUMNS", "200")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (link,) = set(re.findall(r"\((benchmarks/demo/[\d-]+)\)", readme))
    runs = defaultdict(list)
    for file in (ROOT / link).glob("*.jsonl"):
        run = results.Run.read(file)
        runs[run.start.recipe].append(run)
    table = table_after("README.md", "| | `sinkgd` | `adamw`")
    names = table[""]
    assert sorted(names) == sorted(runs)
    losses = [[run.evaluations[-1].val_loss for run in runs[name]] for name in names]
    quoted = [f"{mean(own):.3f} ± {(max(own) - min(own)) / 2:.3f}" for own in losses]
    assert table["final validation loss, nats per token"] == quoted
    memory = [[run.end.memory for run in runs[name]] for name in names]
    states = [max(m.state_bytes for m in own) / 2**20 for own in memory]
    assert table["optimizer state, MiB"] == [f"{state:.1f}" for state in states]
    peaks = [max(m.peak_bytes for m in own) / 2**30 for own in memory]
    assert table["peak memory of the process, GiB"] == [f"{peak:.2f}" for peak in peaks]

    page = str(tmp_path / "page.html")
    assert import_module("sinkgd.lab.cli").main(["report", str(ROOT / link), "--out", page]) == 0
    printed = capsys.readouterr().out.replace("\xa0", " ").replace("adamw (baseline)", "adamw")
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    report = {row[0]: row[1:] for row in rows}
    order = [rows[0].index(name) for name in names]
    shares = [re.sub(r".*\((.*)\)", r"\1", report["Tokens to reach"][place]) for place in order]
    assert table["tokens to reach AdamW's final loss"] == shares
    steps = [[row for run in runs[name] for row in run.steps] for name in names]
    times = [1000 * mean(row.optimizer_seconds for row in own) for own in steps]
    assert table["time of the optimizer in a step, ms"] == [f"{time:.1f}" for time in times]
    # Forward and backward are the same work, so their time is taken to be equal.
    rest = {name: [row.step_seconds - row.optimizer_seconds for row in own]
            for name, own in zip(names, steps, strict=True)}  # fmt: skip
    by_run = [mean(row.step_seconds - row.optimizer_seconds for row in run.steps)
              for own in runs.values() for run in own]  # fmt: skip
    assert f"took {min(by_run):.2f} to {max(by_run):.2f} s a step" in prose_of("README.md")
    both = mean([*rest["sinkgd"], *rest["adamw"]])
    ours, theirs = (times[names.index(name)] / 1000 for name in ("sinkgd", "adamw"))
    needed = int(shares[names.index("sinkgd")].split()[0]) / 100
    time = needed * (both + ours) / (both + theirs)
    assert f"needs {time:.0%} of AdamW's time".replace("%", " %") in prose_of("README.md")


@pytest.mark.parametrize(
    ("study", "arm", "control"),
    [
        ("table1", "sinkgd", "adamw"),
        ("table1-long", "sinkgd", "adamw"),
        ("recipes", "default", "adamw"),
        ("pareto-20m", "sinkgd", "adamw"),
        ("recipes-momentum", "default", "adamw-0.5"),
        ("recipes-momentum", "default", "muon-0.5"),
        ("batch", "sinkgd-batch4", "adamw-batch4"),
        ("batch", "sinkgd-batch64", "adamw-batch64"),
    ],
)
def test_the_shares_of_tokens_in_the_evidence_are_recorded(study, arm, control):
    verdict = (ROOT / f"benchmarks/studies/{study}/verdict.md").read_text(encoding="utf-8")
    table = verdict[verdict.index(f"## To reach {control}’s final loss") :]
    row = next(line for line in table.splitlines() if line.startswith(f"| {arm} |"))
    share = row.split("|")[4].strip().replace("\xa0", " ").replace(" %)", ")")
    assert share in prose_of("docs/evidence.md") + prose_of("docs/evidence-notes.md")


def arms_of(study):
    record = import_module("sinkgd.lab.experiments.study_record").StudyRecord.read(
        ROOT / f"benchmarks/studies/{study}/study.jsonl"
    )
    results = import_module("sinkgd.lab.experiments.study_results").StudyResults.of(record)
    return {one.arm.name: [result.run for result in one.seeds] for one in results.arms}


def test_the_share_of_the_tokens_of_adamw_with_less_momentum_is_the_recorded_one():
    shares, arms = import_module("sinkgd.lab.report.token_share"), arms_of("beta1")
    pairs = zip(arms["sinkgd-0.9"], arms["adamw-0.5"], strict=True)
    share = str(shares.MeanShare.of([shares.token_share(*pair) for pair in pairs]))
    said = share.replace("\xa0", " ").replace(" %)", ")")
    assert said in prose_of("docs/evidence.md")
    assert said in prose_of("docs/evidence-notes.md")


def test_what_adamw_loses_by_its_search_is_the_recorded_one():
    of_losses = import_module("sinkgd.lab.report.difference").Difference.of
    found, default = arms_of("table1"), arms_of("batch")["adamw-batch16"]
    searched, ours = found["adamw"][: len(default)], found["sinkgd"][: len(default)]
    rates = [runs[0].start.config["optimizer"]["lr"] for runs in (searched, default)]
    assert rates == [0.04, 0.08]  # the second is the recipe's default
    losses = [
        {run.start.seed: run.evaluations[-1].val_loss for run in runs}
        for runs in (searched, default, ours)
    ]
    assert said(of_losses(losses[0], losses[1])) in prose_of("docs/evidence.md")
    for one, other in ((0, 1), (1, 2)):
        assert said(of_losses(losses[one], losses[other])) in prose_of("docs/evidence-notes.md")


def said(difference):
    return f"{difference.mean:.3f} ± {difference.half_width:.3f}"


def test_the_evidence_is_read_in_three_minutes():
    lines = (ROOT / "docs/evidence.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines]
    # Commands and records are looked up, not read: the third of the four columns of the claims.
    read = [" ".join(row[:3] + row[4:]) if len(row) == 6 else " ".join(row) for row in rows]
    words = re.sub(r"\]\([^)]*\)", "]", " ".join(read)).split()  # without addresses of links
    assert len(words) <= 3 * 300  # silent reading, words a minute


STEPS = "2026-11-28-epyc"
ROWS = {
    "SinkGD deflated, 15 directions (the default)": "deflated",
    "SinkGD without deflation, L = 5": "sinkgd-cpu",
    "SGD fused": "sgd-fused",
    "naive loop, as in public SinkGD code": "naive-loop",
    "Muon": "muon",
}
COLUMNS = [(w, d) for w in ("llama-1b-layer", "llama-60m") for d in ("float32", "bfloat16")]


def of_fused_adamw(record, contender):
    """Return the medians of the ratios, round by round, from the seconds that were recorded."""
    rounds = json.loads((ROOT / f"benchmarks/step/{record}.json").read_text(encoding="utf-8"))
    ratios = []
    for workload, dtype in COLUMNS:
        (timings,) = (
            {timing["name"]: timing["seconds"] for timing in one["timings"]}
            for one in rounds["workloads"]
            if (one["workload"], one["dtype"]) == (workload, dtype)
        )
        pairs = zip(timings[contender], timings["adamw-fused"], strict=True)
        ratios.append(f"{median(ours / adamw for ours, adamw in pairs if ours is not None):.2f}")
    return ratios


def test_the_speeds_of_the_readme_are_the_recorded_ones():
    assert f"(benchmarks/step/{STEPS}.json)" in prose_of("README.md")
    table = table_after("README.md", "| × fused AdamW")
    assert len(table) == len(ROWS) + 1
    for row, contender in ROWS.items():
        assert table[row] == of_fused_adamw(STEPS, contender)


SPEEDS = {
    "AdamW, foreach": "adamw-foreach",
    "SGD, fused": "sgd-fused",
    "Muon": "muon",
    "the naive public loop": "naive-loop",
    "the same, compiled": "compiled-loop",
    "SinkGD `eager`, L = 5": "sinkgd-eager",
    "SinkGD `cpu`, L = 5": "sinkgd-cpu",
    "SinkGD `cpu`, L = 1": "sinkgd-cpu-L1",
    "SinkGD with deflation, the default": "deflated",
    "SinkGD with deflation, 8 directions (older rule)": "deflated",
    "SWAN, five Newton–Schulz steps": "swan",
}
NOT_MEASURED_RATIOS = ("AdamW, fused: milliseconds", "floor of L = 5")


def test_the_share_of_a_training_step_is_the_recorded_one():
    run = import_module("sinkgd.lab.results").Run.read(ROOT / "benchmarks/share/2026-11-30.jsonl")
    shares = [100 * one.optimizer_seconds / one.step_seconds for one in run.steps[2:]]
    speed, evidence = prose_of("docs/speed.md"), prose_of("docs/evidence.md")
    assert f"{run.start.tokens_per_step:,} tokens per step" in speed
    assert run.start.environment["threads"] == 1
    assert f"the default takes {median(shares):.2f} % of a step on one thread" in speed
    assert f"of the last {len(shares)} steps, which lie between {min(shares):.2f} and" in speed
    assert f" and {max(shares):.2f} % (`sinkgd train" in speed
    assert f"in float32 on one idle thread, it is {median(shares):.2f} % for a" in evidence


def test_the_run_of_muon_on_two_processors_is_the_recorded_one():
    read = import_module("sinkgd.lab.results").Run.read
    run = read(ROOT / "benchmarks/muon/2026-11-30-momentum-0.5.jsonl")
    study = import_module("sinkgd.lab.experiments.study_record").StudyRecord.read(
        ROOT / "benchmarks/studies/recipes-momentum/study.jsonl"
    )
    first, second = run.evaluations[-1].val_loss, study.runs[run.start.name].loss
    said = f"ended at {first:.3f} on the first processor, and at {second:.3f} on the second."
    assert said in prose_of("docs/experiments.md")


def test_the_quartiles_of_the_page_on_speed_are_the_recorded_ones():
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    sections = text.split("| × fused AdamW, median (quartiles)")
    checked = 0
    for before, table in pairwise(sections):
        (*_, record) = re.findall(r"benchmarks/step/([\w-]+)\.json", before)
        timings = timings_of(record)
        for line in table.split("\n\n")[0].splitlines()[2:]:
            label, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
            if label.startswith(NOT_MEASURED_RATIOS):
                continue
            for cell, column in zip(cells, COLUMNS, strict=True):
                found = quartiles(
                    ratios(timings[column][SPEEDS[label]], timings[column]["adamw-fused"])
                )
                shown = re.findall(r"[\d.]+", cell)
                exact = [found.median, found.lower, found.upper][: len(shown)]
                for one, figure in zip(shown, exact, strict=True):
                    digits = len(one.partition(".")[2])
                    assert one == f"{figure:.{digits}f}", (record, label, column, cell)
                    checked += 1
    assert checked > 100


def timings_of(record):
    rounds = json.loads((ROOT / f"benchmarks/step/{record}.json").read_text(encoding="utf-8"))
    return {
        (one["workload"], one["dtype"]): {
            timing["name"]: timing["seconds"] for timing in one["timings"]
        }
        for one in rounds["workloads"]
    }


def test_the_losses_of_the_readme_are_those_of_the_verdicts():
    readme = prose_of("README.md")
    quoted = {
        "table1": ["sinkgd", "swan", "adamw", "muon", "sinkgd-paper", "adamw-one-lr"],
        "recipes-momentum": ["default", "adamw", "adamw-0.5", "muon", "muon-0.5"],
        "pareto": ["sinkgd", "sinkgd-stateless", "adamw-one-lr"],
    }
    for study, arms in quoted.items():
        verdict = (ROOT / f"benchmarks/studies/{study}/verdict.md").read_text(encoding="utf-8")
        seeds = 5 if study == "table1" else 3
        for arm in arms:
            line = rf"^\| {arm}(?: \(control\))? \| {seeds} \| (.*?) \|"
            loss = re.search(line, verdict, re.MULTILINE)
            assert loss is not None
            shown = loss[1].replace("\xa0", " ")
            assert (shown.split()[0] if study == "pareto" else shown) in readme


def test_the_rule_of_deflation_is_quoted_as_recorded():
    losses = []
    for seed in range(3):
        name = f"benchmarks/deflation/next-15-rate-0.002-seed-{seed}.jsonl"
        run = import_module("sinkgd.lab.results").Run.read(ROOT / name)
        losses.append(run.evaluations[-1].val_loss)
    quoted = f"{mean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}"
    pages = ["README.md", "docs/choose.md", "docs/experiments.md"]
    assert all(quoted in prose_of(page) for page in pages)


def test_the_large_model_of_the_readme_is_the_recorded_one():
    record = ROOT / "benchmarks/large/2026-11-25-llama-7b.jsonl"
    run = import_module("sinkgd.lab.results").Run.read(record)
    seconds = [step.seconds for step in run.steps]
    readme = prose_of("README.md")
    memory = run.end.memory
    weights, peak = (size / 2**30 for size in (memory.weights_bytes, memory.peak_bytes))
    step = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    assert f"{run.start.parameters / 1e9:.2f} billion parameters" in readme
    assert f"Weights take {weights:.2f} GiB and the peak is {peak:.2f} GiB" in readme
    tokens = run.start.tokens_per_step
    assert f"each step of {tokens} tokens, except the first, takes {step:.0f} seconds" in readme


@pytest.mark.slow
def test_the_messages_of_the_default_are_those_of_the_plan(capsys):
    cli = import_module("sinkgd.lab.cli")
    assert cli.main(["plan", "--model", "llama-3-70b", "--mesh.dp-shard", "8", "--json"]) == 0
    methods = {m["name"]: m for m in json.loads(capsys.readouterr().out)["methods"]}
    sent = {}
    for name in ("sinkgd", "sinkgd-paper"):
        (own,) = (m for m in methods[name]["messages"] if m["optimizer"])
        sent[name] = f"{own['count']:,}", own["bytes"]
    gib, mib = sent["sinkgd"][1] / 2**30, sent["sinkgd-paper"][1] / 2**20
    for page in ("README.md", "docs/use.md"):
        text = prose_of(page)
        assert f"{sent['sinkgd'][0]} all-reduces with {gib:.2f} GiB in total" in text
        assert f"{sent['sinkgd-paper'][0]} with {mib:.0f} MiB in total" in text
    for page in ("docs/many-devices.md", "docs/how-it-works.md"):
        assert sent["sinkgd"][0] in prose_of(page)


def test_the_reference_has_every_exported_name():
    pages = "\n".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")
    )
    shown = {
        line.rpartition(".")[2] for line in pages.splitlines() if line.startswith("::: sinkgd.")
    }
    assert NAMES - shown == set()


def test_the_table_of_fine_tuning_is_the_study():
    record = import_module("sinkgd.lab.experiments.study_record").StudyRecord.read(
        ROOT / "benchmarks/studies/finetune/study.jsonl"
    )
    results = import_module("sinkgd.lab.experiments.study_results").StudyResults.of(record)
    ours = "SinkGD with `adamw_lr`, "
    rows = {
        "muon": "Muon, AdamW on the rest",
        "sinkgd": ours + "deflated as by default",
        "rows-only": "normalized rows alone, AdamW on the rest",
        "adamw": "AdamW",
        "sinkgd-plain": ours + "`deflated_rank=0",  # the cell's end is stripped
        "sgd": "SGD",
        "lora-sinkgd": "LoRA of rank 8, SinkGD on the factors",
        "lora-adamw": "LoRA of rank 8, AdamW",
    }
    table = table_after("docs/from-adamw.md", "| | rate, for SinkGD `adamw_lr` | speeches | novels")
    assert [*table][1:] == [rows[one.arm.name] for one in results.ranked]
    for one in results.arms:
        ends = [result.run.evaluations[-1].other_val_loss for result in one.seeds]
        begin = one.seeds[0].run.evaluations[0].other_val_loss
        rate = f"{one.chosen['optimizer.lr']:g}"
        assert table[rows[one.arm.name]] == [rate, f"{one.loss:.3f}", f"{mean(ends) - begin:+.3f}"]
    page = prose_of("docs/from-adamw.md")
    at_adamws = {
        name: next(
            (f"{run.val_loss:.3f}", f"{run.other_val_loss:.3f}")
            for result in results.arm(name).grid
            if result.point["optimizer.lr"] == 0.002
            for run in [result.run.evaluations[-1]]
        )
        for name in ("sinkgd", "adamw")
    }
    (new, old), (adamws_new, adamws_old) = at_adamws["sinkgd"], at_adamws["adamw"]
    words = f"ended at {new} on the speeches and at {old} on the novels, "
    assert words + f"AdamW at {adamws_new} and {adamws_old}" in page
    for name in ("sinkgd", "sinkgd-plain"):
        difference = results.difference(results.arm(name), results.arm("adamw"))
        assert f"{difference.mean:+.3f} ± {difference.half_width:.3f}" in page
        assert difference.level


FINE_TUNED = {
    "AdamW": ("adamw", False),
    "8-bit AdamW": ("adamw-8bit", False),
    "Muon, AdamW on the rest": ("muon", False),
    "SinkGD, AdamW on the rest": ("sinkgd", True),
    "SinkGD plain, AdamW on the rest": ("sinkgd-paper", True),
    "SinkGD, 8-bit AdamW on the rest": ("sinkgd-8bit", True),
    "LoRA, rank 8 on all matrices of the blocks, AdamW": ("lora", False),
}


def gib(size):
    return f"{size / 2**30:#.3g}"


def test_the_memory_of_a_full_fine_tune_is_the_planned_one():
    plan = import_module("sinkgd.lab.plan")
    commands = import_module("sinkgd.lab.commands.plan")
    page = prose_of("docs/from-adamw.md")
    kept, released = (
        commands.Plan(recompute_activations=True, release_gradients=release, all=True)
        for release in (False, True)
    )
    for command in (kept, released):
        assert f"`{command._command()}`" in page
    work, grid = kept._question().work, plan.Grid()
    freeing = released._question().work
    assert (work.architecture.name, work.sequence_length, work.batch_size) == ("llama-7b", 2048, 1)
    table = table_after("docs/from-adamw.md", "| | weights | state | gradients")
    assert [*table][1:] == [*FINE_TUNED]
    for row, (name, can_release) in FINE_TUNED.items():
        method = plan.find_method(name)
        assert method.can_release == can_release
        own = plan.rank_memory(work, grid, method)
        parts = own.weights, own.state, own.all_gradients, own.peak
        last = gib(plan.rank_memory(freeing, grid, method).peak) if can_release else "–"
        assert table[row] == [*map(gib, parts), last]
    hooked = [
        gib(plan.rank_memory(freeing, grid, replace(plan.find_method(name), can_release=True)).peak)
        for name in ("adamw", "adamw-8bit")
    ]
    assert "AdamW would peak at {} GiB, and 8-bit AdamW at {} GiB".format(*hooked) in page


def test_the_measured_memory_of_fine_tuning_is_the_recorded_one():
    path = ROOT / "benchmarks/finetune/2026-11-29-llama-1b-memory.jsonl"
    table = table_after("docs/from-adamw.md", "| | state | peak planned")
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = {name: row.removesuffix(" on the rest") for row, (name, _) in FINE_TUNED.items()}
    names["lora"] = "LoRA"
    for run in runs:
        assert (run["model"], run["tokens"]) == ("llama-1b", 256)
        row = names[run["method"]] + (", gradients released" if run["released"] else "")
        planned, measured = run["planned"], run["measured"]
        assert planned["state"] == measured["state"]
        found = measured["state"], planned["peak"], measured["peak"], measured["process"]
        assert table[row] == [*map(gib, found)]
    assert len(table) == len(runs) + 1
