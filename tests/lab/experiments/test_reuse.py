"""Studies side by side train what they have in common once."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest

from lab.experiments.conftest import ARMS, small_plan
from sinkgd.lab.experiments import engine
from sinkgd.lab.experiments.engine import run_study
from sinkgd.lab.experiments.scheduler import ReusableRuns
from sinkgd.lab.experiments.study_record import StudyRecord
from sinkgd.lab.experiments.study_report import sessions_table
from sinkgd.lab.train.config import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studies(shards, tmp_path_factory):
    """A folder with two finished studies; the second has an arm that the first has not."""
    folder = tmp_path_factory.mktemp("studies")
    run(small_plan(shards, arms=ARMS[:1]), folder / "first")
    run(small_plan(shards), folder / "second")
    return folder


@pytest.fixture
def first(studies, tmp_path):
    """A copy of the first, with room beside it."""
    return shutil.copytree(studies / "first", tmp_path / "first")


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that are trained, as they begin."""
    names = []
    start = engine.start_training

    def noted(config, folder, *, plain):
        names.append(folder.name)
        return start(config, folder, plain=plain)

    monkeypatch.setattr(engine, "start_training", noted)
    return names


def run(plan, folder, **options):
    given = {"jobs": 2, "command": "sinkgd experiment", "say": lambda _: None, **options}
    return run_study(plan, folder, **given).record


def shelf_beside(folder, environment=None, say=pytest.fail):
    """What a study in ``folder`` could take over, by default from studies as they were made."""
    if environment is None:
        neighbour = next(iter(folder.parent.glob("*/study.jsonl")))
        environment = StudyRecord.read(neighbour).sessions[0].environment
    return ReusableRuns.collect(folder, environment, say)


def test_what_a_neighbour_has_tuned_is_taken_over_and_what_is_reported_is_not(studies):
    before = StudyRecord.read(studies / "first" / "study.jsonl").runs
    record = StudyRecord.read(studies / "second" / "study.jsonl")
    assert (len(before), len(record.runs)) == (4, 8)
    for name, new in record.runs.items():
        assert new.study == ("iterations" if name in before and new.tuning else "")
        if name in before:
            old = before[name]
            assert (new.arm, new.tuning, new.point) == (old.arm, old.tuning, old.point)
            losses = [e.val_loss for e in new.run.evaluations]
            assert losses == [e.val_loss for e in old.run.evaluations]
    assert not (studies / "second" / "runs" / "sinkgd-L2-tune-lr0.01").exists()
    assert (studies / "second" / "runs" / "sinkgd-L2-seed0").exists()
    (session,) = record.sessions
    assert session.runs == 6
    assert "Of the 8 runs, 2 were made by other studies" in sessions_table(record).note


def test_an_arm_of_another_name_takes_over_what_has_its_configuration(shards, first, trained):
    renamed = replace(ARMS[0], name="two-iterations")
    record = run(small_plan(shards, arms=(renamed,), seeds=(0,)), first.parent / "second")
    assert trained == ["two-iterations-seed0"]
    taken = record.runs["two-iterations-tune-lr0.01"]
    assert (taken.name, taken.arm) == ("two-iterations-tune-lr0.01", "two-iterations")


def test_what_was_taken_over_is_not_handed_on(studies, tmp_path):
    shutil.copytree(studies / "second", tmp_path / "second")
    reusable = shelf_beside(tmp_path / "third")
    assert {result.arm for result in reusable.results.values()} == {"adamw"}


def test_nothing_is_taken_over_where_that_is_not_asked(shards, first, trained):
    run(small_plan(shards, arms=ARMS[:1], seeds=(0,)), first.parent / "second", reuse=False)
    assert len(trained) == 3


@pytest.mark.parametrize("name", ["torch", "numba", "cpu", "threads", "device", "sinkgd", "source"])
def test_nothing_is_taken_over_from_another_environment(first, name):
    session = StudyRecord.read(first / "study.jsonl").sessions[0]
    other = {**session.environment, name: "another"}
    assert len(shelf_beside(first.parent / "new").results) == 2
    assert not shelf_beside(first.parent / "new", other).results


def test_nothing_is_taken_over_from_a_version_that_recorded_no_source(first):
    path = first / "study.jsonl"
    environment = StudyRecord.read(path).sessions[0].environment
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.get("environment", {}).pop("source", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert not shelf_beside(first.parent / "new", environment).results


def test_a_study_without_a_session_lends_nothing(first):
    """Nothing says in which environment its runs ran: an older version was killed."""
    path = first / "study.jsonl"
    environment = StudyRecord.read(path).sessions[0].environment
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] != "session"]
    path.write_text("".join(kept), encoding="utf-8")
    assert not shelf_beside(first.parent / "new", environment).results


def test_a_neighbour_that_cannot_be_read_is_named(first):
    said = []
    (first / "study.jsonl").write_text('{"kind":"odd"}\n', encoding="utf-8")
    shelf_beside(first.parent / "new", {}, say=said.append)
    assert "first/study.jsonl:1 is not a record" in said[0]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_neighbour_that_is_no_file_is_no_study(tmp_path, kind):
    said = []
    path = tmp_path / "odd" / "study.jsonl"
    path.parent.mkdir()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert not shelf_beside(tmp_path / "new", {}, say=said.append).results
    assert said == []


def test_a_study_on_paper_is_passed_over(first):
    (first / "study.jsonl").write_text('{"kind": "paper"}\n', encoding="utf-8")
    assert not shelf_beside(first.parent / "new", {}).results


def write_text_again(shards, folder):
    """Copy shards, with one token of the training text changed."""
    copy = folder / shards.name
    shutil.copytree(shards, copy)
    shard = copy / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[:2], content[2:4] = content[2:4], content[:2]
    assert content != shard.read_bytes()
    shard.write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["files"][shard.name]["sha256"] = hashlib.sha256(content).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def test_the_same_text_at_another_place_is_the_same(shards, first, trained, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "elsewhere")
    run(small_plan(copy, arms=ARMS[:1], seeds=(0,)), first.parent / "second")
    assert trained == ["sinkgd-L2-seed0"]


def test_another_text_at_the_same_place_is_trained_on(shards, first, trained, tmp_path):
    lines = (first / "study.jsonl").read_text("utf-8")
    other = write_text_again(shards, tmp_path / "other")
    (first / "study.jsonl").write_text(lines.replace(str(shards), str(other)), encoding="utf-8")
    run(small_plan(other, arms=ARMS[:1], seeds=(0,)), first.parent / "second")
    assert len(trained) == 3


def test_a_neighbour_that_did_not_record_its_text_is_not_used(shards, first, trained):
    rows = [json.loads(line) for line in (first / "study.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row.get("start", {}).pop("inputs", None)
    (first / "study.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(small_plan(shards, arms=ARMS[:1], seeds=(0,)), first.parent / "second")
    assert len(trained) == 3


def test_a_study_does_not_go_on_with_another_text(shards, first, trained, tmp_path):
    lines = (first / "study.jsonl").read_text("utf-8").splitlines(keepends=True)
    other = write_text_again(shards, tmp_path / "other")
    kept = [line for line in lines if '"name":"sinkgd-L2-seed1"' not in line]  # one run is gone
    left = "".join(kept).replace(str(shards), str(other))
    (first / "study.jsonl").write_text(left, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trained on data with the hash .* now has the hash"):
        run(small_plan(other, arms=ARMS[:1]), first)
    assert trained == []
