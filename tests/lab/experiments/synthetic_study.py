"""Studies made up for tests: records with the losses that a test asks for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sinkgd.lab.experiments.study import Study, plan_of
from sinkgd.lab.experiments.study_record import RunResult, Session, StudyRecord
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.results import Evaluation, Memory, Run, RunEnd, RunStart, TrainStep

TOKENS = 1000  # a step
REST = 0.8  # seconds of a step without its optimizer, alike in all runs
SESSION = Session(2, 6, 310.0, 600.0, 10.0, {"torch": "2.13", "cores": 2})


def made_up_run(
    name: str, seed: int, loss: float, *, recipe: str = "sinkgd", step_seconds: float = 1.0
) -> Run:
    """Four evaluations, 25 steps apart, that fall to ``loss``; no finite loss: it failed."""
    at = [{"step": s, "tokens": s * TOKENS, "seconds": s * step_seconds} for s in (25, 50, 75, 100)]
    values = [loss + gap for gap in (1.5, 0.6, 0.2, 0.0)]
    steps = [
        TrainStep(**row, loss=v + 0.1, lr=0.1, gradient_norm=1.0, step_seconds=step_seconds,
                  optimizer_seconds=step_seconds - REST)
        for row, v in zip(at, values, strict=True)
    ]  # fmt: skip
    evaluations = [
        Evaluation(**row, val_loss=v, perplexity=math.exp(v), bits_per_byte=v / 3, eval_tokens=64)
        for row, v in zip(at, values, strict=True)
        if math.isfinite(v)
    ]
    status = "finished" if math.isfinite(loss) else "failed"
    end = RunEnd(
        status, 100, 100 * TOKENS, 100 * step_seconds, 101 * step_seconds, Memory(10, 10, 20, 900)
    )
    start = RunStart(name, recipe, seed, "sinkgd train", {"seed": seed}, {}, 1000, TOKENS)
    return Run(Path("study.jsonl"), start, steps, evaluations, end)


def made_up_record(
    study: Study,
    losses: Mapping[str, Sequence[float]],
    *,
    best: Mapping[str, int] | None = None,
    step_seconds: Mapping[str, float] | None = None,
    **options: object,
) -> StudyRecord:
    """Make a record of the arms that have ``losses``, one a seed.

    Args:
        study: Gives the arms.
        losses: Final ones, by arm.
        best: By arm, the place of the best point in its grid; the second by default.
        step_seconds: By arm; 1 by default.
        options: Of the plan.
    """
    seeds = tuple(range(max(map(len, losses.values()))))
    arms = tuple(arm for arm in study.settings["machine"].arms if arm.name in losses)
    assert len(arms) == len(losses)
    plan = plan_of(study, "machine", **{"arms": arms, "seeds": seeds, **options})
    record = StudyRecord(plan.as_json(), f"sinkgd experiment {study.name}")
    for arm in arms:
        recipe, pace = arm.overrides["optimizer.recipe"], (step_seconds or {}).get(arm.name, 1.0)
        for i, point in enumerate(arm.points()):
            off = 0.3 * abs(i - (best or {}).get(arm.name, 1))
            name = plan.tuning_task(arm, point).name
            run = made_up_run(name, plan.tuning_seed, 4.0 + off, recipe=recipe)
            record.runs[name] = RunResult(arm.name, True, point, run)
        for seed, value in enumerate(losses[arm.name]):
            name = f"{arm.name}-seed{seed}"
            run = made_up_run(name, seed, value, recipe=recipe, step_seconds=pace)
            point = next(iter(arm.points()), {})  # without it some arms are no configuration
            data = asdict(plan.config(plan.seed_task(arm, point, seed)).data)
            run = replace(run, start=replace(run.start, config=run.start.config | {"data": data}))
            record.runs[name] = RunResult(arm.name, False, {}, run)
    record.sessions.append(SESSION)
    return record


def made_up(study: Study, losses: Mapping[str, Sequence[float]], **options: object) -> StudyResults:
    """Make results; see `made_up_record`."""
    return StudyResults.of(made_up_record(study, losses, **options))
