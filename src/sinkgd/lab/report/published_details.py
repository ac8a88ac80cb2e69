"""The smaller tables of published figures: memory, speed and longer runs."""

from dataclasses import dataclass

from sinkgd.lab.report import quantities
from sinkgd.lab.report.published import (
    APOLLO,
    GALORE,
    LARGEST,
    LONGER,
    LONGER_STEPS,
    RACS,
    SINKGD,
    SIZES,
    SPEEDUPS,
    THROUGHPUT,
    THROUGHPUT_GPUS,
    TOKEN_FRACTION,
    WEIGHED_GB,
    Source,
    State,
    memory_gib,
)


@dataclass(frozen=True)
class Detail:
    """A table with its words and its papers; the first cell of a row names it."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sources: tuple[Source, ...]


_KEEPERS = (
    ("Adam, Stable-SPAM", State.MOMENTS),
    ("Muon in the blocks", State.MATRIX_MOMENTUM),
    ("SinkGD, SWAN, RACS, APOLLO-Mini", State.NONE_IN_BLOCKS),
    ("SCALE", State.HEAD_MOMENTUM),
    ("SGD", State.NOTHING),
)


def details() -> tuple[Detail, ...]:
    """Make all of them.

    >>> [len(detail.rows) for detail in details()]
    [5, 8, 3, 3]
    """
    return _memory(), _speed(), _longer(), _weighed()


def _memory() -> Detail:
    sizes = (*SIZES, LARGEST)
    return Detail(
        title="Memory of weights and state",
        note="GiB, by the benchmark’s formula: two bytes for each weight and each number that is "
        "kept. Embedding, head and norms are Adam’s, but with SCALE and SGD. Vectors of a row or "
        "a column are left out, below 0.3 %. What GaLore, Fira and APOLLO-SVD keep depends on "
        "their rank.",
        columns=("method", *(size.name for size in sizes)),
        rows=tuple(
            (name, *(f"{memory_gib(size, state):.3g}" for size in sizes))
            for name, state in _KEEPERS
        ),
        sources=(SINKGD, GALORE),
    )


def _speed() -> Detail:
    speedups = tuple(
        (f"steps of {one.against} for a step of SinkGD, to the same loss", one.size,
         f"{one.steps:.1f}×")
        for one in SPEEDUPS
    )  # fmt: skip
    abstract = ("SinkGD’s tokens to Adam’s perplexity", "–", quantities.percent(TOKEN_FRACTION))
    throughput = tuple(
        (f"tokens a second, {name}", "1.3B", quantities.count(speed))
        for name, speed in THROUGHPUT.items()
    )
    return Detail(
        title="Speed",
        note="Effective: the tokens that Adam needs in all, over the seconds that SinkGD needs to "
        f"Adam’s final perplexity. It has the saved steps in it already. "
        f"On {THROUGHPUT_GPUS} A100.",
        columns=("what", "size", "published"),
        rows=(*speedups, abstract, *throughput),
        sources=(SINKGD,),
    )


def _longer() -> Detail:
    return Detail(
        title="1.3B against 7B",
        note="Perplexity on the way to 150,000 steps.",
        columns=("method", *(f"{steps // 1000}k steps" for steps in LONGER_STEPS)),
        rows=tuple(
            (f"{one.method}, {one.size}", *(f"{value:.2f}" for value in one.values))
            for one in LONGER
        ),
        sources=(APOLLO, RACS),
    )


def _weighed() -> Detail:
    return Detail(
        title="Memory as weighed",
        note="GB at 1.3B and a batch of 256, everything included.",
        columns=("method", "GB"),
        rows=tuple((name, f"{value:.2f}") for name, value in WEIGHED_GB.items()),
        sources=(GALORE,),
    )
