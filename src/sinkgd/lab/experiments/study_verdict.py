"""The verdict of a study: sentences made only from its numbers, and functions that judges share.

Two arms differ if the 95 % interval of their difference over paired seeds excludes zero, and the
difference is large enough to show in printed losses. Otherwise they are level, or unknown if they
have fewer than two seeds in common.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.report.analysis import preset_of
from sinkgd.lab.report.difference import Difference
from sinkgd.lab.report.quantities import count, duration, loss, percent

_MANY = 3  # arms, from which their number is worth a caution


@dataclass(frozen=True)
class Verdict:
    """The conclusions of a study, in plain sentences."""

    headline: str
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]
    may_name_cost: bool = True  # whether `with_cost` may add the best arm's cost to the headline


def unfinished(results: StudyResults) -> Verdict | None:
    """Return the verdict of a study without results of candidates; None if it has such results."""
    if results.candidates:
        return None
    return Verdict(
        "No arm that the question is about has a result yet.", (), tuple(cautions(results))
    )


def ranked(arms: Sequence[ArmResults]) -> list[ArmResults]:
    """Sort arms by their mean loss, the lowest first."""
    return sorted(arms, key=lambda one: math.inf if one.loss is None else one.loss)


def level_with(
    results: StudyResults, one: ArmResults, arms: Sequence[ArmResults]
) -> list[ArmResults]:
    """List the other arms in ``arms`` that do not differ significantly from ``one``."""
    return [other for other in arms if other is not one and results.difference(other, one).level]


def is_at_an_end(best: ArmResults, arms: Sequence[ArmResults]) -> bool:
    """Whether the value of an arm on the study's axis is the smallest or largest of ``arms``."""
    values = [one.arm.value for one in arms if one.arm.value is not None]
    return len(values) > 1 and best.arm.value in (min(values), max(values))


def ended(one: ArmResults) -> str:
    """Name an arm with its loss, or with the number of seeds that diverged."""
    if one.loss is None:
        return f"{one.arm.name} has no result"
    if one.diverged:
        return f"{one.arm.name} diverged in {one.diverged} of {len(one.seeds)} seeds"
    return f"{one.arm.name} ended at {loss(one.loss)}"


def lowest(results: StudyResults, best: ArmResults, *, alone: str = ".") -> str:
    """Return the headline that names the lowest candidate and the candidates level with it.

    Controls that are significantly lower are named, too.

    Args:
        results: The study's results.
        best: The candidate with the lowest mean loss.
        alone: The end of the first sentence if all other candidates are significantly higher.
    """
    others = [one for one in results.candidates if one is not best]
    if not others:
        return f"{ended(best)}."
    if best.loss is None or best.diverged:
        return "Every arm that the question is about diverged in a seed."
    unknown = [one for one in others if results.difference(one, best).unknown]
    level = level_with(results, best, others)
    words = f"{ended(best)}, the lowest"
    if unknown:
        words += f"; {names(unknown)} {_have(unknown)} too few seeds for a comparison."
    else:
        words += f"; level with it: {names(level)}." if level else alone
    below = lower_controls(results, best)
    return f"{words} {names(below)} ended lower." if below else words


def lower_controls(results: StudyResults, one: ArmResults) -> list[ArmResults]:
    """List the controls whose loss is significantly lower than that of ``one``."""
    return [control for control in results.controls if results.difference(control, one).lower]


def _have(arms: Sequence[ArmResults]) -> str:
    return "has" if len(arms) == 1 else "have"


def compared(name: str, difference: Difference, other: str) -> str:
    """Return a sentence that compares two arms.

    >>> compared("L5", Difference(-0.02, 0.01, 3, seeds=3), "adamw")
    'L5 ended 0.020 ± 0.010 lower than adamw.'
    >>> compared("L5", Difference(-0.02, 0.05, 3, seeds=3), "adamw")
    'L5 is level with adamw: the difference is -0.020 ± 0.050.'
    """
    if difference.seeds == 0:
        return f"{name} and {other} have no seed in common."
    if any(difference.diverged):
        first, second = difference.diverged
        return f"{name} diverged in {first} of {difference.seeds} seeds, {other} in {second}."
    if difference.count == 1:
        return f"{name} ended {difference.mean:+.3f} from {other}, on a single seed."
    size = f"{abs(difference.mean):.3f} ± {difference.half_width:.3f}"
    if difference.level:
        return (
            f"{name} is level with {other}: the difference is "
            f"{difference.mean:+.3f} ± {difference.half_width:.3f}."
        )
    return f"{name} ended {size} {'lower' if difference.lower else 'higher'} than {other}."


def against_controls(results: StudyResults, one: ArmResults) -> list[str]:
    """Compare an arm with every control at equal tokens, and at equal seconds."""
    sentences = [
        compared(one.arm.name, results.difference(one, control), control.arm.name)
        for control in results.controls
    ]
    return [*sentences, *_at_equal_seconds(results, one)]


def fewest_tokens(
    results: StudyResults, control: ArmResults, who: str, members: Collection[str]
) -> str:
    """Name the arm that needs the fewest tokens to reach a control's final loss in every seed.

    Args:
        results: The study's results.
        control: The control whose loss is to be reached.
        who: What the members have in common, in words that can follow "those" or "method".
        members: Names of the arms to choose from.
    """
    if control.diverged:
        return f"{ended(control)}, so there is no loss of it to reach."
    found = [
        (comparison.token_fraction.mean, name, comparison)
        for name, comparison in results.analysis(control.arm.name).comparisons.items()
        if name in members and comparison.token_fraction is not None
    ]
    if not found:
        return f"No method {who} reached {control.arm.name}’s loss in every seed."
    fraction, name, comparison = min(found, key=lambda row: row[:2])
    speed = comparison.effective_speedup
    effective = f", effective throughput {speed:.2f} ×"
    if not speed or not results.times_comparable:
        effective = ""
    return (
        f"Of those {who}, {name} needs the fewest tokens for {control.arm.name}’s final loss: "
        f"{percent(fraction)} of them{effective}."
    )


def _at_equal_seconds(results: StudyResults, one: ArmResults) -> list[str]:
    seconds = results.equal_seconds
    if seconds is None or not results.controls:
        return []
    found = [(a, results.loss_after(a, seconds)) for a in (one, *results.controls)]
    words = [f"{arm.arm.name} {loss(spread.mean)}" for arm, spread in found if spread]
    after = f"At equal seconds, after the {duration(seconds)} of the fastest arm"
    return [f"{after}: {', '.join(words)}."] if words else []


def with_cost(results: StudyResults, verdict: Verdict) -> Verdict:
    """Add to the headline the tokens and time that the best arm needed for its control's loss.

    A control counts if it did not diverge and has the best arm's model size, batch and number of
    tokens. Of several with the recipe of the first one, such as two AdamWs, the one with the lowest
    loss is named. The headline does not change without such a control, if the best arm diverged, or
    if the two do not differ significantly.

    Args:
        results: The study's results.
        verdict: The verdict of the study's judge.
    """
    best = next(iter(ranked(results.candidates)), None)
    if not verdict.may_name_cost or best is None or best.loss is None or best.diverged:
        return verdict
    alike = [one for one in results.controls if not one.diverged and _alike(one, best)]
    if not alike:
        return verdict
    control = ranked([one for one in alike if one.arm.recipe == alike[0].arm.recipe])[0]
    difference = results.difference(best, control)
    if not (difference.lower or difference.higher):  # else tokens may differ by chance
        return verdict
    return replace(verdict, headline=f"{verdict.headline} {_needed(results, best, control)}")


def _alike(one: ArmResults, other: ArmResults) -> bool:
    """Whether two arms trained equally large models on equally many tokens in equal batches."""
    return _conditions(one) == _conditions(other)


def _conditions(one: ArmResults) -> set[tuple[int, int, int]]:
    runs = [result.run for result in one.seeds]
    return {(r.start.parameters, r.start.tokens_per_step, r.end.tokens) for r in runs if r.end}


def _needed(results: StudyResults, best: ArmResults, control: ArmResults) -> str:
    name, goal = best.arm.name, f"{control.arm.name}’s final loss"
    found = results.analysis(control.arm.name).comparisons[name]
    if found.token_fraction is None or found.time_fraction is None:
        if not found.reached_runs:
            return f"{name} did not reach {goal}."
        return f"{name} reached {goal} in {found.reached_runs} of {found.runs} seeds."
    tokens, time = found.token_fraction.mean, found.time_fraction.mean
    words = f"{name} reached {goal} with {percent(tokens)} of its tokens"
    if results.times_comparable:
        joint = "but" if time > 1 >= tokens else "and"
        words += f" {joint} {percent(time)} of its time"
    return f"{words}."


def names(arms: Sequence[ArmResults]) -> str:
    """List all arms by name, however many there are; the table has a row for each."""
    words = [one.arm.name for one in arms]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def cautions(results: StudyResults) -> list[str]:
    """List the cautions that do not depend on the question."""
    return [
        *_small_scale(results),
        *_few_seeds(results),
        *_many_arms(results),
        *_several_processors(results),
        *_unequal_times(results),
        *_unequal_effort(results),
        *_edges(results),
        *_diverged(results),
        *_missing(results),
    ]


def _small_scale(results: StudyResults) -> list[str]:
    if results.plan["scale"] != "machine" or not results.runs:
        return []
    run = results.runs[0]
    tokens = sorted({one.end.tokens for one in results.runs if one.end}) or [0]
    sizes = sorted({one.start.parameters for one in results.runs})
    preset = results.plan["shared"]["model"]["preset"] or preset_of(run)
    models = f"{preset} with {count(sizes[0])} parameters"
    if count(sizes[0]) != count(sizes[-1]):
        models = f"models of {count(sizes[0])} to {count(sizes[-1])} parameters"
    trained = count(tokens[-1])
    if count(tokens[0]) != trained:
        trained = f"{count(tokens[0])} to {trained}"
    return [
        f"Machine scale: {models} on {trained} tokens. It shows that the comparison works, "
        "and a direction; it does not show what happens at 60M and above."
    ]


def _few_seeds(results: StudyResults) -> list[str]:
    seeds = results.plan["seeds"]
    if len(seeds) < 3:
        what = "A single seed" if len(seeds) == 1 else "Two seeds"
        return [f"{what} cannot tell a small difference from chance; use --seeds 3 or more."]
    few = [one for one in results.arms if len(seeds[: one.arm.seeds]) < 3]
    if not few:
        return []
    return [f"{names(few)} {_have(few)} fewer than three seeds: too few for a small difference."]


def _many_arms(results: StudyResults) -> list[str]:
    """Warn that the best of many arms looks better than it is."""
    arms = [one for one in results.arms if one.seeds]
    if len(arms) < _MANY or len(results.plan["seeds"]) < 2:
        return []
    return [
        f"Each interval is a 95 % interval by itself. Of {len(arms)} arms, the one that happens to "
        "be the lowest looks better than it is. Of comparisons between arms that do not differ, "
        "about one in twenty shows a difference."
    ]


def _unequal_times(results: StudyResults) -> list[str]:
    if results.times_comparable or len(results.processors) > 1:
        return []
    return ["Not all runs had an equal share of the machine, so no times are compared."]


def _several_processors(results: StudyResults) -> list[str]:
    if len(results.processors) < 2:
        return []
    return [
        f"The study ran on different processors ({'; '.join(results.processors)}): the times of "
        "its arms cannot be compared, and losses differ in their last bits between processors."
    ]


def _unequal_effort(results: StudyResults) -> list[str]:
    if not results.plan["tune"]:
        return ["Nothing was tuned (--no-tune): every arm ran at its own default rates."]
    tuned = [one for one in results.arms if one.arm.tuned]
    fixed = [one for one in results.arms if not one.arm.tuned and not one.arm.carried]
    found = []
    if tuned and fixed:
        points = f"{'at least ' if tuned[0].arm.widened else ''}{len(tuned[0].arm.points())}"
        found.append(
            f"{names(fixed)} {_have(fixed)} rates that the question fixes; the other arms had "
            f"{points} points tuned each."
        )
    efforts = [len(one.grid) for one in tuned if one.arm.widened and one.seeds]
    if efforts and min(efforts) < max(efforts):
        found.append(
            f"Grids grew to {min(efforts)} to {max(efforts)} points, of one run each. An arm with "
            "more points has more chances of a low loss."
        )
    return found


def _edges(results: StudyResults) -> list[str]:
    found = [f"{one.arm.name} ({', '.join(one.edges)})" for one in results.arms if one.edges]
    if not found:
        return []
    return [
        f"The best of the grid is at its edge for {', '.join(found)}: a wider grid may lower the "
        "loss."
    ]


def _diverged(results: StudyResults) -> list[str]:
    found = [
        f"{one.arm.name} diverged in {one.diverged} of {len(one.seeds)} seeds."
        for one in results.arms
        if one.diverged
    ]
    lost = [one for one in results.arms if one.grid and one.chosen is None]
    return found + [f"{one.arm.name} diverged at every point of its grid." for one in lost]


def _missing(results: StudyResults) -> list[str]:
    seeds = results.plan["seeds"]
    missing = [one for one in results.arms if len(one.seeds) < len(seeds[: one.arm.seeds])]
    if not missing:
        return []
    listed = ", ".join(one.arm.name for one in missing)
    return [f"Not finished: {listed} {_have(missing)} not run every seed yet."]
