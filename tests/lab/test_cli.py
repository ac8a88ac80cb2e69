"""The program: it teaches, it words its errors, it has the right exit codes."""

import errno
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sinkgd
from sinkgd.lab.cli import COMMANDS, main
from sinkgd.lab.commands.train import Train
from sinkgd.lab.results import Run
from stopping import stopping_at

WORDS = ("the", "of", "and", "to", "in", "a", "state", "union", "people", "law", "year", "war")


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """Text files, and a cache of their own."""
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        content = " ".join(draw.choice(WORDS) for _ in range(100))
        (folder / f"{i:02d}.txt").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def small(text: Path) -> list[str]:
    """Options of a small training."""
    return [
        *("--data.corpus", str(text), "--data.vocab-size", "300"),
        *("--training.steps", "12", "--training.batch-size", "4"),
        *("--training.sequence-length", "16", "--training.threads", "1"),
        *("--evaluation.every-steps", "4", "--evaluation.tokens", "100"),
    ]


def program(*arguments: str, **popen: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sinkgd.lab.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def flat(shown: str) -> str:
    """Undo the frames and line breaks of a help text."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", shown)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert len(COMMANDS) == 8
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)


def test_help_imports_nothing_but_the_library():
    code = (
        "import sys; from sinkgd.lab.cli import main; main(['--help']);"
        "heavy = {'tyro', 'rich', 'plotly', 'tokenizers', 'transformers', 'jinja2', 'numba'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sinkgd {sinkgd.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: sinkgd {command}" in shown


@pytest.mark.parametrize("command", ["train", "compare", "bench loop"])
def test_every_option_of_a_run_has_a_help_text(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    shown = flat(capsys.readouterr().out)
    assert "--training.sequence-length INT Length of a row of the batch, tokens." in shown
    assert f"sinkgd {command} " in shown.partition("For example:")[2]


def test_an_unknown_command_has_a_nearest_name(capsys):
    assert main(["trian"]) == 2
    known = ", ".join(COMMANDS)
    error = f"there is no command 'trian'; did you mean 'train'? There are {known}."
    assert capsys.readouterr().err == f"error: {error} See `sinkgd --help`\n"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--optimizer.recipe", "sinkg"], 2, "optimizer.recipe is 'sinkg'; did you mean 'sinkgd'"),
        (["--training.steps", "0"], 2, "training.steps is 0; it must be at least 1"),
        (
            ["--training.steps", "-3000000000"],
            2,
            "steps is -3000000000; it must be at least -2",
        ),
        (["--training.micro-batch-size", "3"], 2, "micro_batch_size is 3, which does not divide"),
        (["--config", "none.toml"], 2, "there is no configuration file none.toml"),
        (["--resume", "must"], 2, "holds no checkpoint to go on from"),
        (["--model.preset", "lama-nano"], 2, "did you mean 'llama-nano'"),
        (["--data.corpus", "/nowhere/at/all"], 2, "/nowhere/at/all"),
        (["--training.batch-size", "100000"], 2, "too little text for one batch"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(capsys, tmp_path, small, options, code, message):
    assert main(["train", "--out", str(tmp_path / "run"), *small, *options]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_where_its_results_are(capsys, tmp_path, small):
    out = tmp_path / "my run"
    said = f"The results are in {out / 'run.jsonl'}. Table and page: sinkgd report '{out}'"
    for _ in range(2):
        assert main(["train", "--out", str(out), *small]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == said


def test_compare_is_no_rank_of_torchrun(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--out", str(tmp_path)]) == 2
    assert "cannot be one of 2 ranks; start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--training.step", "3"], "--training.step, 3; did you mean --training.steps?"),
        (["--optimizer.lr", "abc"], "optimizer.lr must be a number, got 'abc'."),
        (["--resume", "maybe"], "resume must be one of 'auto', 'never', 'must'; got 'maybe'."),
        (["--training.steps"], "Missing value for argument '--training.steps'."),
    ],
)
def test_an_option_that_cannot_be_read_is_one_line(capsys, options, words):
    assert main(["train", *options]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .* See `sinkgd train --help`\n", said)
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), said)


def test_a_typo_in_a_file_names_file_and_key(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nbatchsize = 4\n", encoding="utf-8")
    assert main(["train", "--config", str(path)]) == 2
    error = f"{path}: unknown key training.batchsize; did you mean training.batch_size?"
    assert capsys.readouterr().err == f"error: {error}\n"


def test_options_go_before_the_file(tmp_path, small):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 3\nseed = 5\n[optimizer]\nrecipe = 'sgd'\n")
    arguments = ["train", "--out", str(tmp_path / "run"), f"--config={path}", *small]
    assert main(arguments) == 0
    start = Run.read(tmp_path / "run" / "run.jsonl").start
    assert start.config["training"]["steps"] == 12
    assert (start.recipe, start.seed) == ("sgd", 5)


def test_a_full_disk_in_the_results_is_an_error(capsys, monkeypatch, tmp_path, small):
    def fill_the_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sinkgd.lab.results.ResultsWriter.write", fill_the_disk)
    assert main(["train", "--out", str(tmp_path / "run"), *small]) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room there, or write elsewhere"),
        (errno.EMFILE, "allow this process more open files, e.g. `ulimit -n 4096`"),
        (errno.ENFILE, "the whole system has too many open files; end other programs"),
        (errno.EACCES, "change its permissions, or give another path"),
        (errno.ENOTDIR, "move away what is there, or give another path"),
        (errno.EROFS, "; give another path"),
    ],
)
@pytest.mark.parametrize("failing", ["results.ResultsWriter.write", "train.checkpoint.checksums"])
def test_each_error_of_the_system_has_its_own_remedy(
    capsys, monkeypatch, tmp_path, small, failing, code, remedy
):
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), "there")

    monkeypatch.setattr(f"sinkgd.lab.{failing}", fail)
    assert main(["train", "--out", str(tmp_path / "run"), *small]) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert remedy in line
    assert ("make room" in line) == (code == errno.ENOSPC)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --optimizer.lr abc", "optimizer.lr must be a number, got 'abc'. See"),
        ("train --training.steps 1.5", "training.steps must be a whole number, got '1.5'. See"),
        ("train --training.threads two", "training.threads must be a whole number, got 'two'. See"),
        ("prepare --validation-fraction x", "validation-fraction must be a number, got 'x'. See"),
        (
            "train --training.precision fp8",
            "training.precision must be one of 'float32', 'bf16-autocast', 'bf16'; got 'fp8'. See",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_in_plain_words(capsys, arguments, message):
    assert main(arguments.split()) == 2
    assert f"error: {message} `sinkgd" in capsys.readouterr().err


def test_ctrl_c_outside_training_has_its_exit_code(capsys, monkeypatch, tmp_path):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sinkgd.lab.train.run.set_up", interrupt)
    assert main(["train", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_a_second_ctrl_c_after_the_message_of_a_stopped_run_adds_no_line(
    capsys, monkeypatch, small, tmp_path
):
    finish = Train.run

    def run_and_interrupt(self: Train) -> int:
        finish(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Train, "run", run_and_interrupt)
    with stopping_at(2, signal.SIGINT):
        assert main(["train", "--out", str(tmp_path / "run"), *small]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped by SIGINT after step 2 of")


def test_doctor_names_the_kernels_and_what_is_absent(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    find_spec = "sinkgd.lab.commands.doctor.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None if name == "datasets" else object())
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"eager +(will|can) run", shown)
    assert shown.count("will run") == 1
    assert re.search(r"c4 .*absent; pip install '\.\[c4\]'", shown)
    assert shown.count("absent") == 1


def test_doctor_says_where_prepared_texts_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    for made in (False, True):
        if made:
            (tmp_path / "cache").mkdir()
        assert main(["doctor"]) == 0
        (line,) = [s for s in capsys.readouterr().out.splitlines() if "prepared texts" in s]
        assert str(tmp_path / "cache") in line
        assert ("made when a text is first prepared" in line) == (not made)


def test_bench_writes_its_figures(capsys, tmp_path, small):
    out = tmp_path / "loop.json"
    options = ["--rounds", "2", "--steps-per-block", "1", "--out", str(out), "--optimizers", "sgd"]
    assert main(["bench", "loop", *options, *small]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    bare, ours = result["contenders"]
    assert (bare["name"], bare["of_bare"]) == ("bare loop, fused AdamW", 1.0)
    assert ours["name"] == "sinkgd train, sgd"
    assert 0 < ours["slowest"] <= ours["tokens_per_second"] <= ours["fastest"]
    assert result["environment"]["threads"] == 1
    assert "of bare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "sinkgd,adanw"], "optimizer.recipe is 'adanw'; did you mean 'adamw'"),
        (["--optimizers", ","], "optimizers is empty"),
        (["--baseline", "adam"], "baseline is 'adam', .* did you mean 'adamw'"),
        (["--seeds", "0"], "seeds is 0; it must be from 1 to 1000"),
    ],
)
def test_a_comparison_is_checked_before_it_begins(capsys, tmp_path, options, message):
    assert main(["compare", "--out", str(tmp_path / "c"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_comparison_trains_each_optimizer_once(capfd, tmp_path, small):
    out = tmp_path / "c"
    two = ["--optimizers", "sinkgd,adamw", "--seeds", "2"]
    arguments = ["compare", "--out", str(out), *two, *small]
    assert main(arguments) == 0
    shown = capfd.readouterr().out
    names = ["sinkgd-seed0", "adamw-seed0", "sinkgd-seed1", "adamw-seed1"]
    assert re.findall(r"^run . of 4: (.*)$", shown, re.MULTILINE) == names
    assert "adamw (baseline)" in shown
    assert str(out / "report.html") in shown
    results = {name: (out / name / "run.jsonl") for name in names}
    assert all(Run.read(path).finished for path in results.values())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "sinkgd compare" in re.sub(r"<[^>]+>", "", page)

    before = {name: path.read_bytes() for name, path in results.items()}
    assert main(arguments) == 0
    assert "run 1 of" not in capfd.readouterr().out
    assert {name: path.read_bytes() for name, path in results.items()} == before

    assert main([*arguments, "--training.steps", "13"]) == 2
    assert "training.steps was 12 and is now 13" in capfd.readouterr().err


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    while not (path.exists() and text in path.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_comparison_goes_on(tmp_path, small, number, code):
    out = tmp_path / "c"
    arguments = ["compare", "--out", str(out), *small, "--training.steps", "60"]
    process = program(*arguments)
    wait_for(out / "adamw-seed0" / "run.jsonl", '"step": 5', process)
    process.send_signal(number)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"stopped by {number.name}" in said
    assert "Go on with" not in said  # not the command of the one run
    program_name, *go_on = shlex.split(re.findall(r"^Go on with: (.*)$", shown, re.MULTILINE)[0])
    assert program_name == "sinkgd"
    process = program(*go_on)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.findall(r"^run . of .: .*$", shown, re.MULTILINE) == ["run 3 of 3: adamw-seed0"]
    assert " minutes this time. The page: " in shown
    assert "going on from" in said
    assert Run.read(out / "adamw-seed0" / "run.jsonl").steps[-1].step == 60


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_killed_comparison_stops_its_training_which_saves(tmp_path, small):
    out = tmp_path / "c"
    process = program("compare", "--out", str(out), *small, "--training.steps", "2000")
    results = out / "sinkgd-seed0" / "run.jsonl"
    wait_for(results, '"step": 5', process)
    process.kill()
    process.communicate(timeout=60)  # its output ends when the training has ended too
    end = Run.read(results).end
    assert end is not None
    assert end.status == "interrupted"
    assert (out / "sinkgd-seed0" / "checkpoints" / f"step-{end.step:08d}").is_dir()


@pytest.mark.slow
def test_a_failed_training_stops_the_comparison_with_its_exit_code(capfd, tmp_path, small):
    out = tmp_path / "c"
    assert main(["compare", "--out", str(out), *small, "--training.batch-size", "100000"]) == 2
    captured = capfd.readouterr()
    assert "error: too little text" in captured.err
    assert "run 2 of" not in captured.out
    assert not (out / "report.html").exists()


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "sinkgd.lab.cli", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def in_shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the shell in which "$@" is the program."""
    shell = ["bash", "-c", command, "bash", sys.executable, "-m", "sinkgd.lab"]
    return subprocess.run(shell, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", ["doctor", "--help", "plan --model llama-60m"])
def test_a_pipe_that_closes_early_is_no_error(arguments):
    found = in_shell(f'"$@" {arguments} | true; exit ${{PIPESTATUS[0]}}')
    assert found.returncode == 141
    assert "rror" not in found.stderr


@pytest.mark.parametrize("arguments", ["--version", "--help", "bench", "doctor"])
def test_a_full_disk_below_the_output_is_one_line(arguments):
    found = in_shell(f'"$@" {arguments} > /dev/full')
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 1
    assert last.startswith("error: [Errno 28] No space left on device; make room there")
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="script has other options elsewhere")
@pytest.mark.parametrize(
    "variable", ["NO_COLOR=1", pytest.param("TERM=dumb", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("arguments", ["train --help", "doctor", "plan --nope"])
def test_a_terminal_that_wants_no_color_has_none(variable, arguments):
    command = f"{sys.executable} -m sinkgd.lab {arguments}"
    found = in_shell(f"TERM=xterm {variable} script -qec '{command}' /dev/null")
    assert "sinkgd" in found.stdout
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)", found.stdout)


@pytest.mark.parametrize(
    "kib", [1_000_000, *(pytest.param(k, marks=pytest.mark.slow) for k in (900_000, 1_100_000))]
)
def test_a_limit_of_memory_is_named(tmp_path, small, kib):
    """Which library fails first depends on the machine; it may fit, or abort the process itself."""
    out = tmp_path / "run"
    found = in_shell(f'ulimit -v {kib}; "$@" train --out {out} {" ".join(small)}')
    if found.returncode > 0:
        line = found.stderr.splitlines()[-1]
        assert (found.returncode, "Traceback" in found.stderr) == (1, False)
        assert line.startswith("error: out of memory: ")
        assert f"`ulimit -v` limits this process to {kib / 2**20:.1f} GiB, raise that" in line


@pytest.mark.parametrize(
    ("error", "limited"),
    [
        (OSError("Could not find/load shared object file 'libllvmlite.so' from ..."), True),
        (RuntimeError("could not create a primitive"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (MemoryError(), False),
    ],
)
def test_what_fails_for_a_limit_of_memory_says_so(capsys, monkeypatch, tmp_path, error, limited):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sinkgd.lab.train.run.set_up", fail)
    limit = 2**30 if limited else resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ")
    assert ("`ulimit -v` limits this process to 1.0 GiB" in said) == limited


@pytest.mark.parametrize(
    "closed",
    [
        "<&- >&- 2>&-",
        "2>/dev/full",
        *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-", "2> >(true)")),
    ],
)
def test_training_does_not_end_where_nobody_can_read(tmp_path, small, closed):
    out = tmp_path / "run"
    found = in_shell(f'"$@" train --out {out} {" ".join(small)} {closed}')
    assert found.returncode == 0
    assert Run.read(out / "run.jsonl").finished
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--out", ""], "the value of --out"),
        (["train", "--out="], "--out"),
        (["plan", "--model", ""], "the value of --model"),
        (["bench", "step", "--workloads", ""], "the value of --workloads"),
        (["prepare", ""], "an argument"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(capsys, monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert f"error: {named} is empty; give a value, or leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["taken", "taken/below", "x" * 300])
def test_a_path_that_cannot_be_used_is_named_with_a_remedy(capsys, tmp_path, small, out):
    (tmp_path / "taken").write_text("")
    assert main(["train", "--out", str(tmp_path / out), *small]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / out.partition("/")[0]) in message
    assert message.endswith("give another path")


@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        ("sinkgd.lab.plan.make_plan", ["plan", "--model", "llama-60m"]),
        ("sinkgd.lab.bench.bench_loop.bench_loop", ["bench", "loop"]),
        ("sinkgd.lab.bench.bench_step.bench_step", ["bench", "step"]),
        ("sinkgd.lab.bench.bench_kernels.bench_kernels", ["bench", "kernels"]),
        ("sinkgd.lab.bench.bench_memory.bench_memory", ["bench", "memory"]),
    ],
)
@pytest.mark.parametrize("out", ["taken/below", "folder"])
def test_an_out_that_cannot_be_written_is_refused_before_the_work(
    capsys, monkeypatch, tmp_path, work, arguments, out
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(work, never)
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    takes_a_file = "loop" in arguments
    path = tmp_path / (out if takes_a_file else "taken" if out == "folder" else out)
    assert main([*arguments, "--out", str(path)]) == 2
    assert "give another path" in capsys.readouterr().err
