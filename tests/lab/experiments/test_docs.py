"""The documents list every study with its question."""

from pathlib import Path

from sinkgd.lab.experiments.studies import QUESTIONS

DOCS = Path(__file__).parents[3] / "docs/experiments.md"


def test_every_study_is_in_the_documents_with_its_question():
    text = DOCS.read_text(encoding="utf-8").replace("'", "’")
    assert len(QUESTIONS) == 18
    for name, question in QUESTIONS.items():
        link = f"[`{name}`](../benchmarks/studies/{name}/verdict.md)"
        assert f"| {link} | {question} |" in text
