"""The study `scale`: the fewest devices, its verdict, and its file."""

from dataclasses import replace

import pytest

from sinkgd.lab.cli import main
from sinkgd.lab.experiments.studies import scale
from sinkgd.lab.experiments.studies.scale import (
    BASELINE,
    METHODS,
    RANKS,
    Fit,
    fewest_devices,
    is_on_paper,
    judge,
    read_fits,
    write_fits,
)
from sinkgd.lab.plan import Grid, Work, find_architecture, find_method, rank_memory
from sinkgd.lab.results import ResultsError

GIB = 2**30
FIT = Fit("big", BASELINE, "AdamW", 10**10, 8, 70 * GIB, 1.0, 1000.0)


def fits(**ranks):
    rest = {"sinkgd": "SinkGD", "muon": "Muon", BASELINE: "AdamW"}
    return [replace(FIT, method=m, title=rest[m], ranks=n) for m, n in ranks.items()]


@pytest.mark.parametrize("method", ["sinkgd", "adamw"])
def test_one_device_fewer_would_not_do(method):
    found = fewest_devices("llama-10b", method)
    work = Work(
        find_architecture("llama-10b"),
        sequence_length=4096,
        precision="bf16",
        release=method == "sinkgd",
        recompute=True,
        loss_chunk_tokens=1024,
    )
    known = find_method(method)
    assert found.ranks == {"sinkgd": 1, "adamw": 2}[method]
    peaks = {n: rank_memory(work, Grid(dp_shard=n), known).peak for n in (1, found.ranks)}
    assert found.peak_bytes == peaks[found.ranks] <= 72 * GIB
    assert found.ranks == 1 or peaks[1] > 72 * GIB


def test_what_fits_on_none_has_no_number_of_devices():
    found = fewest_devices("llama-10b", "adamw", ranks=(1,))
    assert found.ranks is None
    assert found.peak_bytes > 72 * GIB


@pytest.mark.parametrize(
    ("ranks", "headline", "sentence"),
    [
        (
            {"sinkgd": 2, "muon": 4, BASELINE: 8},
            "Without state, 1/4 of AdamW’s devices can be enough (big).",
            "big: AdamW needs 8; with 2: SinkGD.",
        ),
        (
            {"sinkgd": 8, "muon": 8, BASELINE: 8},
            "No method needs fewer devices than AdamW.",
            "big: AdamW needs 8; with 8: SinkGD; Muon; AdamW.",
        ),
        (
            {"sinkgd": 64, "muon": None, BASELINE: None},
            "The baseline fits nowhere.",
            f"big: AdamW needs more than {RANKS[-1]}; with 64: SinkGD.",
        ),
        (
            {"sinkgd": None, BASELINE: None},
            "The baseline fits nowhere.",
            f"big fits with no method on {RANKS[-1]} devices.",
        ),
    ],
)
def test_words_follow_from_the_numbers(ranks, headline, sentence):
    verdict = judge(fits(**ranks))
    assert verdict.headline == headline
    assert verdict.sentences == (sentence,)


def test_hours_are_those_of_all_devices():
    assert replace(FIT, tokens_per_device_second=1e12 / 3600).device_hours == pytest.approx(1.0)


def test_the_file_comes_back(tmp_path):
    found = fits(sinkgd=2, muon=None)
    write_fits(tmp_path, found, "sinkgd experiment scale")
    assert is_on_paper(tmp_path / "study.jsonl")
    assert read_fits(tmp_path / "study.jsonl") == ("sinkgd experiment scale", found)
    (tmp_path / "study.jsonl").write_text('{"kind": "paper"}\n', encoding="utf-8")
    with pytest.raises(ResultsError, match="is not a study on paper of this version"):
        read_fits(tmp_path / "study.jsonl")
    assert not is_on_paper(tmp_path / "absent")
    with pytest.raises(ResultsError, match="no study at"):
        read_fits(tmp_path / "absent")


def test_the_command_plans_writes_and_shows_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "METHODS", ("sinkgd", BASELINE))
    monkeypatch.setattr(scale.run_on_paper, "__defaults__", (lambda _: None, ("llama-10b",)))
    out = tmp_path / "scale"
    assert main(["experiment", "scale", "--dry-run", "--out", str(out)]) == 0
    assert not out.exists()
    assert main(["experiment", "scale", "--out", str(out)]) == 0
    assert "1/2 of AdamW’s devices can be enough (llama-10b)" in capsys.readouterr().out
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "1/2 of AdamW’s devices can be enough (llama-10b)" in page
    assert len(read_fits(out / "study.jsonl")[1]) == 2
    text = (out / "verdict.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {scale.QUESTION}\n\n**Without state, 1/2 of AdamW’s devices")
    assert "| AdamW | 2 | " in text


def test_every_method_of_the_study_is_one_of_the_plan():
    assert [find_method(name).name for name in METHODS] == list(METHODS)
