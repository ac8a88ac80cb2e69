"""Whether the best rank of deflation grows with the width of the model.

Letters:
    d: the hidden size
    k: the rank, the number of leading singular values that deflation lowers
"""

from collections.abc import Mapping, Sequence

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    cautions,
    compared,
    is_at_an_end,
    level_with,
    ranked,
    unfinished,
)
from sinkgd.lab.models.presets import preset_config
from sinkgd.lab.report.quantities import percent

RANK = "optimizer.deflated_rank"

WIDTHS = {"llama-nano": 128, "llama-20m": 256}
PAPER_WIDTHS = {"llama-60m": 512, "llama-130m": 768}
# k + 1, the number of directions that are followed, is the width divided by each of these.
PARTS = (32, 16, 8, 4)

# All ranks of a width try the same rates of matrices, at one rate of embeddings and head. Grids
# that grow around their best points would give some ranks more points than others, and the gain
# from these points is as large as the differences between ranks.
GRIDS: Mapping[int, Grid] = {
    128: {LR: (0.08,), MATRIX_LR: (0.001, 0.002, 0.004, 0.008)},
    256: {LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    512: {LR: (0.02,), MATRIX_LR: (0.00025, 0.0005, 0.001, 0.002)},
    768: {LR: (0.02,), MATRIX_LR: (0.00025, 0.0005, 0.001, 0.002)},
}


def ranks(width: int) -> tuple[int, ...]:
    """Return the ranks that a model of this width tries.

    >>> ranks(128)
    (3, 7, 15, 31)
    """
    return tuple(width // part - 1 for part in PARTS)


def arms_at(presets: Mapping[str, int]) -> tuple[Arm, ...]:
    """Return one arm for each width and rank.

    Args:
        presets: Models, with their widths.
    """
    return tuple(
        Arm(
            f"width-{width}-rank-{rank}",
            {"model.preset": preset, "optimizer.recipe": "sinkgd", RANK: rank},
            GRIDS[width],
            value=float(rank),
            series=f"width {width}",
        )
        for preset, width in presets.items()
        for rank in ranks(width)
    )


def _by_width(results: StudyResults) -> dict[int, list[ArmResults]]:
    """Return the deflated arms that have results, by width."""
    found: dict[int, list[ArmResults]] = {}
    for one in results.candidates:
        found.setdefault(_width(one), []).append(one)
    return found


def _width(one: ArmResults) -> int:
    return preset_config(one.arm.overrides["model.preset"]).hidden_size


def _rank(one: ArmResults) -> int:
    return int(one.arm.value or 0)


def judge(results: StudyResults) -> Verdict:
    """Name the rank with the lowest loss at each width, and compare the others with it."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    widths = _by_width(results)
    best = {width: ranked(arms)[0] for width, arms in widths.items()}
    words = [_best_in_words(results, width, one, widths[width]) for width, one in best.items()]
    headline = " ".join(words)
    sentences = [
        "The shares of the width count the next direction, too, to which the others are lowered."
    ]
    for width, one in best.items():
        sentences += [
            compared(other.arm.name, results.difference(other, one), one.arm.name)
            for other in ranked(widths[width])[1:]
        ]
    at_the_ends = [
        f"The lowest loss at width {width} is that of {one.arm.name}, the smallest or largest rank "
        "tried: others may be lower."
        for width, one in best.items()
        if not one.diverged and is_at_an_end(one, widths[width])
    ]
    return Verdict(headline, tuple(sentences), (*cautions(results), *at_the_ends))


def _best_in_words(
    results: StudyResults, width: int, best: ArmResults, arms: Sequence[ArmResults]
) -> str:
    """Name the rank with the lowest loss at a width, and those that are level with it."""
    if best.diverged:
        return f"At width {width} every rank diverged in a seed."
    share = percent((_rank(best) + 1) / width)
    words = f"At width {width} rank {_rank(best)} ends lowest ({share} of the width"
    others = [one for one in ranked(arms) if one is not best]
    if any(results.difference(one, best).unknown for one in others):
        return f"{words}); more seeds are needed to compare the other ranks with it."
    level = ", ".join(str(_rank(one)) for one in level_with(results, best, others))
    return f"{words}), level with {level}." if level else f"{words}), beyond the spread of seeds."


RANKS = Study(
    name="rank",
    question="Does the best rank of deflation grow with the width of the model?",
    background="At widths of 48 to 256 the directions that stand out of an update are at most "
    "about a tenth of the width. The default rank, 15, was chosen at width 128. Spectra lowers "
    "1.5 % of the directions, in models 4,096 wide.",
    settings={
        "machine": Setting(MACHINE, arms_at(WIDTHS)),
        "paper": Setting(BENCHMARK["llama-60m"], arms_at(PAPER_WIDTHS)),
    },
    judge=judge,
    axis=Axis("rank", "deflated rank, k", log=True),
)
