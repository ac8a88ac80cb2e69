"""`sinkgd bench`: it teaches, errors name the option, and files come where they were asked for."""

import json

import pytest
import torch

import sinkgd.lab.bench.bench_kernels as kernels_bench
from sinkgd import kernels
from sinkgd.lab.bench.contenders import our_name
from sinkgd.lab.bench.workloads import WORKLOADS, Workload
from sinkgd.lab.cli import main
from sinkgd.lab.commands.bench import COMMANDS
from sinkgd.lab.commands.bench.memory import Memory, TrainingSteps
from sinkgd.lab.commands.bench.shared import chosen, command_of
from sinkgd.lab.commands.bench.step import Step


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_measurement(capsys, arguments):
    assert main(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    assert set(COMMANDS) == {"step", "memory", "gpu", "kernels", "loop"}
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name:<12}{summary}\n" in shown


@pytest.mark.parametrize("measurement", COMMANDS)
def test_every_measurement_explains_itself_and_has_an_example(capsys, measurement):
    assert main(["bench", measurement, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: sinkgd bench {measurement}" in shown
    assert f"sinkgd bench {measurement} " in shown.partition("For example:")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stpe"],
            "there is no measurement 'stpe'; did you mean 'step'? There are step, memory, gpu, "
            "kernels, loop. See `sinkgd bench --help`",
        ),
        (["step", "--workloads", "lama-60m"], "workloads is 'lama-60m'; did you mean 'llama-60m'?"),
        (["step", "--workloads", ","], "workloads is empty; give one or more of llama-60m,"),
        (["step", "--workloads", "all,lama-60m"], "workloads is 'lama-60m'; did you mean"),
        (["step", "--dtypes", "bfloat"], "dtypes is 'bfloat'; did you mean 'bfloat16'?"),
        (["step", "--contenders", "moun"], "contenders is 'moun'; did you mean 'muon'?"),
        (["step", "--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["step", "--seconds", "0"], "seconds is 0.0; it must be above 0"),
        (["step", "--threads", "0"], "threads is 0; this machine has "),
        (["memory", "--workloads", "accuracy"], "workloads is 'accuracy'; there are llama-60m, "),
        (["step", "--workloads", "none"], "workloads is 'none'; there are llama-60m, "),
        (
            ["memory", "--training.models", "llama-1c"],
            "training.models is 'llama-1c'; did you mean 'llama-1b'?",
        ),
        (["memory", "--training.batch-size", "0"], "training.batch_size is 0; it must be at"),
        (
            ["memory", "--workloads", "none", "--training.models", "none"],
            "workloads and training.models are both none; choose one of them",
        ),
        (["kernels", "--cases", "64x65"], "cases is '64x65'; did you mean '64x64'?"),
        (["loop", "--rounds", "0"], "rounds is 0; it must be at least 1"),
    ],
)
def test_errors_name_the_option_and_the_nearest_value(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys):
    assert main(["bench", "step", "--device", "cuda"]) == 2
    assert "device is 'cuda', but torch finds no CUDA device" in capsys.readouterr().err


def test_the_command_repeats_the_options_that_were_given():
    options = Step(workloads="llama-60m", rounds=3)
    assert command_of("step", options) == "sinkgd bench step --workloads llama-60m --rounds 3"
    assert command_of("step", Step()) == "sinkgd bench step"
    training = TrainingSteps(batch_size=2, recompute=False)
    assert command_of("memory", Memory(workloads="none", training=training)) == (
        "sinkgd bench memory --workloads none --training.batch-size 2 --training.no-recompute"
    )


def test_step_writes_its_record_and_its_page(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(WORKLOADS, "llama-60m", Workload("llama-60m", "few", lambda: ((6, 4),)))
    ours = our_name(kernels.select("auto", torch.device("cpu")).name, 5)
    names = ["--workloads", "llama-60m", "--dtypes", "float32", "--contenders", ours]
    options = ["--rounds", "3", "--threads", "1", "--device", "cpu"]
    options += ["--out", str(tmp_path / "bench")]
    assert main(["bench", "step", *names, *options]) == 0
    shown = capsys.readouterr()
    assert "× AdamW" in shown.out
    assert "llama-60m, float32, L=5, × AdamW" in shown.out
    assert "This run measured 1 of 12 targets." in shown.out
    assert "llama-1b-layer" not in shown.out
    assert "llama-60m float32: 0" in shown.err
    record = json.loads((tmp_path / "bench" / "step.json").read_text(encoding="utf-8"))
    assert record["environment"]["threads"] == 1
    assert record["command"].startswith("sinkgd bench step --workloads llama-60m --dtypes float32")
    assert [t["name"] for t in record["workloads"][0]["timings"]] == ["adamw-fused", ours]
    assert len(record["targets"]) == 12
    page = (tmp_path / "bench" / "step.html").read_text(encoding="utf-8")
    assert "few: 1 tensors" in page


def test_kernels_writes_its_record_and_its_page(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(kernels_bench.CASES, "tiny", ((6, 4),))
    options = ["--cases", "tiny", "--dtypes", "float32", "--rounds", "2", "--out", str(tmp_path)]
    assert main(["bench", "kernels", *options]) == 0
    assert "eager: scales, L=5" in capsys.readouterr().out
    record = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert [case["case"] for case in record["cases"]] == ["tiny"]
    assert (tmp_path / "kernels.html").exists()


@pytest.mark.slow
def test_memory_writes_its_record_and_its_page(capsys, tmp_path):
    names = ["--workloads", "many-small", "--contenders", "sgd-fused"]
    names += ["--training.models", "llama-9m", "--training.recipes", "sgd"]
    assert main(["bench", "memory", *names, "--out", str(tmp_path)]) == 0
    assert "SGD fused" in capsys.readouterr().out
    record = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert [use["dtype"] for use in record["uses"]] == ["float32"]
    assert [use["recipe"] for use in record["training"]["uses"]] == ["sgd"]
    assert (tmp_path / "memory.html").exists()


def test_all_stands_for_every_name_alone_or_in_a_list():
    for value in ("all", "one,all", "all, two"):
        assert chosen("workloads", value, ["one", "two"]) == ("one", "two")
