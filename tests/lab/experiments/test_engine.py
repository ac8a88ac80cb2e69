"""The engine on a study of seconds: arms tuned alike, nothing done twice, nothing forgotten."""

import errno
import fcntl
import json
import shutil
import signal
from dataclasses import replace

import pytest

from lab.experiments.conftest import ARMS, small_plan
from sinkgd.lab.cli import main
from sinkgd.lab.experiments import engine
from sinkgd.lab.experiments.arms import Arm
from sinkgd.lab.experiments.engine import run_study
from sinkgd.lab.experiments.studies import find_study
from sinkgd.lab.experiments.study import StudyError
from sinkgd.lab.experiments.study_record import StudyRecord, StudyWriter
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.results import Run
from sinkgd.lab.train import ConfigError, RunFolderError, train

said: list[str] = []


def run(plan, folder, jobs=2):
    return run_study(plan, folder, jobs=jobs, command="sinkgd experiment", say=said.append)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """The folder of a study that nothing stopped."""
    folder = tmp_path_factory.mktemp("study")
    outcome = run(small_plan(shards), folder)
    assert outcome.left == 0
    assert outcome.signal is None
    return folder


@pytest.fixture
def record(finished):
    return StudyRecord.read(finished / "study.jsonl")


def test_every_arm_is_tuned_on_its_whole_grid_and_then_run_with_every_seed(record):
    names = [f"{arm.name}-{rest}" for arm in ARMS for rest in
             ("tune-lr0.01", "tune-lr0.04", "seed0", "seed1")]  # fmt: skip
    assert sorted(record.runs) == sorted(names)
    assert all(result.run.finished for result in record.runs.values())
    tuning_seeds = {result.seed for result in record.runs.values() if result.tuning}
    assert tuning_seeds == {1000}


def test_seeds_run_at_the_best_point_of_the_grid(record):
    for arm in ARMS:
        grid = [r for r in record.runs.values() if r.arm == arm.name and r.tuning]
        best = min(grid, key=lambda result: result.loss)
        for seed in (0, 1):
            used = record.runs[f"{arm.name}-seed{seed}"].run.start.config["optimizer"]["lr"]
            assert used == best.point["optimizer.lr"]


def test_a_run_of_a_study_is_that_of_sinkgd_train_to_the_bit(finished, record, plan, tmp_path):
    arm = ARMS[0]
    point = record.runs["sinkgd-L2-seed1"].point
    task = plan.seed_task(arm, point, 1)
    train(plan.config(task), tmp_path / "alone", echo=said.append)
    alone = Run.read(tmp_path / "alone" / "run.jsonl")
    within = Run.read(finished / "runs" / task.name / "run.jsonl")
    assert [s.loss for s in within.steps] == [s.loss for s in alone.steps]
    assert [e.val_loss for e in within.evaluations] == [e.val_loss for e in alone.evaluations]
    kept = record.runs[task.name].run
    assert [e.val_loss for e in kept.evaluations] == [e.val_loss for e in alone.evaluations]


def test_what_is_finished_is_not_run_again(finished, plan, monkeypatch):
    monkeypatch.setattr(engine, "start_training", lambda *_, **__: pytest.fail("run again"))
    before = (finished / "study.jsonl").read_bytes()
    assert run(plan, finished).left == 0
    assert (finished / "study.jsonl").read_bytes() == before


def test_a_run_that_ended_before_it_was_written_down_is_written_down(
    finished, plan, tmp_path, monkeypatch
):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    path = folder / "study.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if '"kind":"run"' not in line][:1]
    path.write_text("".join(kept) + '{"kind":"ru', encoding="utf-8")
    monkeypatch.setattr(engine, "start_training", lambda *_, **__: pytest.fail("run again"))
    run(plan, folder)
    again, first = StudyRecord.read(path), StudyRecord.read(finished / "study.jsonl")
    assert {n: r.loss for n, r in again.runs.items()} == {n: r.loss for n, r in first.runs.items()}


@pytest.mark.parametrize("command", [["report"], ["experiment", "iterations", "--report", "--out"]])
def test_page_and_verdict_need_the_record_alone(finished, tmp_path, capsys, command):
    shutil.copy(finished / "study.jsonl", tmp_path)
    record = StudyRecord.read(tmp_path / "study.jsonl")
    assert main([*command, str(tmp_path)]) == 0
    study = find_study("iterations")
    verdict = study.judge(StudyResults.of(record))
    said = capsys.readouterr().out
    for sentence in (verdict.headline, *verdict.sentences, *verdict.cautions):
        assert sentence in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("sinkgd-L2", "adamw", "Every point of the grids", "lr 0.04"):
        assert name in page
    assert (tmp_path / "study.jsonl").stat().st_size < 4096 * len(record.runs)


def test_the_time_of_the_runs_and_of_the_study_are_recorded(record):
    (session,) = record.sessions
    assert session.runs == len(record.runs)
    ends = [result.run.end.wall_seconds for result in record.runs.values()]
    assert session.runs_wall_seconds == pytest.approx(sum(ends))
    assert session.wall_seconds > sum(ends) / 2


def test_checkpoints_of_finished_runs_are_gone(finished):
    assert not list(finished.glob("runs/*/checkpoints"))
    assert len(list(finished.glob("runs/*/run.jsonl"))) == 8


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (lambda p: replace(p, seeds=(0, 1, 2)), "seeds was [0, 1] and is now [0, 1, 2]"),
        (lambda p: replace(p, tune=False), "tune was True and is now False"),
        (lambda p: replace(p, arms=ARMS[:1]), "arms.adamw.overrides.optimizer.recipe was 'adamw'"),
        (
            lambda p: replace(
                p, shared=replace(p.shared, training=replace(p.shared.training, steps=7))
            ),
            "options: training.steps was 6 and is now 7",
        ),
    ],
)
def test_a_study_with_other_options_is_refused(finished, plan, changed, field):
    with pytest.raises(ConfigError, match="has other options") as error:
        run(changed(plan), finished)
    assert field in str(error.value)


def test_arms_may_be_added_later_and_finished_runs_stay(shards, tmp_path):
    less, more = small_plan(shards, arms=ARMS[1:]), small_plan(shards)
    run(less, tmp_path)
    first = StudyRecord.read(tmp_path / "study.jsonl")
    run_study(more, tmp_path, jobs=2, command="sinkgd experiment again", say=said.append)
    record = StudyRecord.read(tmp_path / "study.jsonl")
    assert list(record.plan["arms"]) == [arm.name for arm in ARMS]
    assert record.command == "sinkgd experiment again"
    assert set(record.runs) - set(first.runs) == {
        name for name in record.runs if name.startswith(ARMS[0].name)
    }
    assert {name: record.runs[name].run.end for name in first.runs} == {
        name: result.run.end for name, result in first.runs.items()
    }
    with pytest.raises(ConfigError, match="has other options"):
        run(less, tmp_path)


def test_what_leaves_the_losses_alone_may_change(finished, plan):
    logging = replace(plan.shared.logging, print_every_steps=1)
    assert run(replace(plan, shared=replace(plan.shared, logging=logging)), finished).left == 0


def test_a_folder_that_another_process_is_at_is_refused(finished, plan):
    with (finished / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="another process is running the study"):
            run(plan, finished)


def test_a_run_that_fails_ends_the_study_with_its_name(shards, tmp_path):
    arm = Arm("odd", {"optimizer.recipe": "sinkgd", "training.sequence_length": 100_000})
    with pytest.raises(StudyError, match="run odd-seed0 ended with exit code 1"):
        run(small_plan(shards, arms=(arm,), seeds=(0,)), tmp_path, jobs=1)


def test_a_run_that_fails_while_the_study_is_stopping_is_left_for_the_next_time(
    shards, tmp_path, monkeypatch
):
    # A second Ctrl-C while a run is set up, or the end of the fork server, gives such codes, too.
    arm = Arm("odd", {"optimizer.recipe": "sinkgd", "training.sequence_length": 100_000})
    wait = engine.wait

    def stop_and_wait(sentinels):
        signal.raise_signal(signal.SIGINT)
        return wait(sentinels)

    monkeypatch.setattr(engine, "_kill", lambda pid, number: None)
    monkeypatch.setattr(engine, "wait", stop_and_wait)
    outcome = run(small_plan(shards, arms=(arm,), seeds=(0,)), tmp_path, jobs=1)
    assert outcome.signal is signal.SIGINT
    assert outcome.left == 1
    assert outcome.record.runs == {}


@pytest.fixture
def started(monkeypatch):
    """The processes of the trainings, as they begin."""
    processes = []
    start = engine.start_training

    def noted(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(engine, "start_training", noted)
    return processes


@pytest.fixture
def alone(tmp_path):
    """The folder of a study without neighbors, whose runs it could reuse."""
    return tmp_path / "studies" / "study"


def test_a_session_is_in_the_record_before_its_first_run_ends(shards, alone, monkeypatch):
    """A kill at any moment leaves the record of this moment."""
    moments = []
    wait = engine.wait

    def look_and_wait(sentinels):
        moments.append(StudyRecord.read(alone / "study.jsonl"))
        return wait(sentinels)

    monkeypatch.setattr(engine, "wait", look_and_wait)
    run(small_plan(shards, arms=ARMS[1:], tune=False), alone, jobs=1)
    for moment in moments:
        (session,) = moment.sessions
        assert session.environment["cpu"]
        assert session.runs == len(moment.runs)
        assert StudyResults.of(moment).processors == (session.environment["cpu"],)
    assert moments[0].runs == {}


@pytest.mark.parametrize("stops", [2, 3])
def test_a_run_that_others_stop_is_resumed_twice(shards, alone, monkeypatch, started, stops):
    wait = engine.wait

    def stop_and_wait(sentinels):
        if len(started) <= stops:
            started[-1].terminate()  # with SIGTERM, as e.g. a limit on the time of processes does
        return wait(sentinels)

    monkeypatch.setattr(engine, "wait", stop_and_wait)
    plan = small_plan(shards, arms=ARMS[1:], seeds=(0,), tune=False)
    if stops > 2:
        with pytest.raises(StudyError, match="run adamw-seed0 was stopped 3 times by a signal"):
            run(plan, alone, jobs=1)
        assert StudyRecord.read(alone / "study.jsonl").runs == {}
        return
    outcome = run(plan, alone, jobs=1)
    assert (outcome.left, outcome.signal, len(started)) == (0, None, 3)
    assert said[-2].startswith("run adamw-seed0 was stopped by a signal that the study did not")
    assert outcome.record.runs["adamw-seed0"].run.finished


def test_an_error_stops_all_trainings_and_leaves_the_session(plan, alone, monkeypatch, started):
    def full(self, result):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StudyWriter, "add_run", full)
    with pytest.raises(OSError, match="No space left"):
        run(plan, alone)
    assert len(started) == 2
    assert not any(process.is_alive() for process in started)
    (session,) = StudyRecord.read(alone / "study.jsonl").sessions
    assert session.runs == 1
    assert session.runs_wall_seconds > 0


def test_a_run_that_diverges_is_a_result(shards, tmp_path):
    grid = {"optimizer.lr": (0.01, 1e30)}
    arm = Arm("wild", {"optimizer.recipe": "sgd", "optimizer.clip_norm": 0.0}, grid)
    plan = small_plan(shards, arms=(arm,), seeds=(0,))
    record = run(plan, tmp_path).record
    assert record.runs["wild-tune-lr1e+30"].loss == float("inf")
    assert record.runs["wild-seed0"].run.finished
    again = StudyRecord.read(tmp_path / "study.jsonl")
    assert again.runs["wild-tune-lr1e+30"].loss == float("inf")
    lines = (tmp_path / "study.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["kind"] in ("plan", "run", "session") for line in lines)
