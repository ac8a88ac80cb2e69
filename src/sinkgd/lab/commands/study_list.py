"""The studies, listed: what `sinkgd experiment` says where no study is named."""

from sinkgd.lab.experiments.studies import QUESTIONS, STUDIES


def studies_text() -> str:
    """Return one line a study, with its question and how many trainings it is."""
    from sinkgd.lab.experiments.study import plan_of

    width = max(map(len, QUESTIONS))
    runs = {name: f"{plan_of(study, 'machine').runs} runs" for name, study in STUDIES.items()}
    lines = [
        f"  {name:<{width}}  {question} ({runs.get(name, 'on paper: no runs')})"
        for name, question in QUESTIONS.items()
    ]
    example = next(iter(STUDIES))
    return "\n".join(
        [
            "usage: sinkgd experiment NAME [OPTIONS]",
            "",
            "studies:",
            *lines,
            "",
            f"`sinkgd experiment {example} --help` shows the options; `--dry-run` shows the plan.",
            "",
        ]
    )
