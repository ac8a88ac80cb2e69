"""The share of AdamW's tokens that a method needs in the study `ladder`, and its trend.

Letters:
    N: number of hidden weights
    C: operations of a training, 6 for each hidden weight and token
    L: final validation loss, nats per token; fitted as a + b (C/C₁)^(-c), see `PowerLaw`
    q: share of tokens that a run needs for the final loss of the better AdamW's run with the same
        seed, see `token_share`
"""

import math
from collections.abc import Mapping, Sequence

from sinkgd.lab.experiments.fits import PowerLaw, Trend, fit_power_law, fit_trend
from sinkgd.lab.experiments.studies.ladder_arms import ADAMWS, FAR_PRESET, hidden_weights
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.report.token_share import token_share


def sizes_of(results: StudyResults, method: str) -> list[ArmResults]:
    """Return a method's arms that have reported runs, from the smallest size to the largest."""
    own = [one for one in results.arms if one.arm.series == method and one.seeds]
    return sorted(own, key=lambda one: one.arm.value or 0.0)


def fit_of(results: StudyResults, method: str) -> PowerLaw | None:
    """Fit the losses of a method over sizes, without sizes at which a seed diverged.

    None if fewer than 4 sizes are left.
    """
    sizes = [one for one in sizes_of(results, method) if not one.diverged]
    if len(sizes) < 4:
        return None
    runs = [(_compute(one), loss) for one in sizes for loss in one.losses.values()]
    return fit_power_law([compute for compute, _ in runs], [loss for _, loss in runs])


def _compute(one: ArmResults) -> float:
    end = one.seeds[0].run.end
    return 6 * (one.arm.value or 0.0) * (end.tokens if end else math.nan)


def shares(results: StudyResults, method: str) -> dict[float, list[float]]:
    """Return q by N, one for each seed that both the method and the better AdamW ran.

    q is infinite for all of AdamW's seeds if the method diverged at every rate of its grid.
    """
    found = {}
    for one in results.arms:
        if one.arm.series != method or (adamw := _better_adamw(results, one.arm.value)) is None:
            continue
        others = {r.seed: r for r in adamw.seeds}
        if _is_lost(one):
            own = [math.inf] * len(others)
        else:
            own = [token_share(r.run, others[r.seed].run) for r in one.seeds if r.seed in others]
        if own:
            found[one.arm.value or math.nan] = own
    return dict(sorted(found.items()))


def _better_adamw(results: StudyResults, size: float | None) -> ArmResults | None:
    """Return the AdamW with the lower mean loss at a size, over the seeds in which all ended.

    An AdamW that diverged at every rate of its grid is left out. If there is no seed in which all
    ended, the AdamW that diverged in the fewest is returned.

    Returns:
        None while there is no seed that all AdamWs at this size have run: the better one is not
        known then.
    """
    planned = [one for one in results.arms if one.arm.series in ADAMWS and one.arm.value == size]
    found = [one for one in planned if not _is_lost(one)]
    common = set.intersection(*(set(one.losses) for one in found)) if found else set()
    if not common:
        return None
    ended = [seed for seed in common if all(math.isfinite(one.losses[seed]) for one in found)]
    if not ended:
        return min(found, key=lambda one: one.diverged)
    return min(found, key=lambda one: sum(one.losses[seed] for seed in ended))


def _is_lost(one: ArmResults) -> bool:
    """Whether an arm diverged at every rate of its grid."""
    return one.chosen is None and len(one.grid) >= one.arm.efforts > 0


def known(own: Sequence[float]) -> list[float]:
    """Return the shares of a size without those of runs that failed."""
    return [q for q in own if math.isfinite(q)]


def has_failed(own: Mapping[float, Sequence[float]]) -> bool:
    """Whether a run of the method or of AdamW failed at any size."""
    return any(len(known(values)) < len(values) for values in own.values())


def trend_of(results: StudyResults, method: str) -> Trend | None:
    """Fit the trend of a method's q over the sizes.

    None below 3 sizes and before every size of the study has a q, and if a run failed: without that
    run the trend would be biased in favor of the method, or of AdamW.
    """
    found = shares(results, method)
    planned = {one.arm.value for one in results.arms if one.arm.series == method}
    if len(found) < max(3, len(planned)) or has_failed(found):
        return None
    points = [(n, q) for n, own in found.items() for q in own]
    far = hidden_weights(FAR_PRESET)
    return fit_trend([n for n, _ in points], [q for _, q in points], far=far)
