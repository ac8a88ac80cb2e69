"""A study in a page of text: small enough to be kept beside its numbers and read in a browser."""

from collections.abc import Sequence

from sinkgd.lab.bench.sheet import Sheet
from sinkgd.lab.experiments.verdict import Verdict

VERDICT_FILE = "verdict.md"  # in the study's folder


def as_markdown(question: str, verdict: Verdict, sheets: Sequence[Sheet], command: str) -> str:
    """Write a study's question, verdict and tables.

    Args:
        question: A sentence that ends in a question mark.
        verdict: What the numbers say.
        sheets: Tables of them.
        command: That repeats the study.

    Examples:
        >>> verdict = Verdict("Yes.", ("A beats B.",), ("One seed.",))
        >>> sheet = Sheet("Arms", "", ("arm", "loss"), (("A", "4.0"),))
        >>> print(as_markdown("Does it?", verdict, [sheet], "sinkgd experiment it"))
        # Does it?
        <BLANKLINE>
        **Yes.**
        <BLANKLINE>
        - A beats B.
        <BLANKLINE>
        Beware:
        <BLANKLINE>
        - One seed.
        <BLANKLINE>
        ## Arms
        <BLANKLINE>
        | arm | loss |
        |---|---|
        | A | 4.0 |
        <BLANKLINE>
        `sinkgd experiment it`
        <BLANKLINE>
    """
    parts = [f"# {question}", f"**{verdict.headline}**", _list(verdict.sentences)]
    if verdict.cautions:
        parts += ["Beware:", _list(verdict.cautions)]
    for sheet in sheets:
        parts += [f"## {sheet.title}", _table(sheet), sheet.note]
    return "\n\n".join(part for part in [*parts, f"`{command}`"] if part) + "\n"


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _table(sheet: Sheet) -> str:
    rows = [sheet.columns, ("---",) * len(sheet.columns), *sheet.rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines[1] = "|" + "---|" * len(sheet.columns)
    return "\n".join(lines)
