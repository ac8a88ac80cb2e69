"""How SinkGD and other methods fine-tune a trained model, and how much the model forgets."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_charts import seed_dots, whiskers
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    cautions,
    compared,
    ended,
    ranked,
    unfinished,
)
from sinkgd.lab.report.figures import Chart, Figure, Identities, Identity, axis, layout
from sinkgd.lab.report.quantities import loss
from sinkgd.lab.results import Evaluation, Run
from sinkgd.lab.train.config import EvaluationConfig, SharedConfig
from sinkgd.optim.param_groups import ADAMW_UPDATE_SIZE

FIRST_STEPS = 20  # if the loss rises within these steps, that counts as a shock
RANK = 8  # of the adapters
WEIGHTS = "runs/gpt2-by-adamw"  # trained model; benchmarks/README.md has the command that makes it
# Folder of a Hugging Face checkpoint, for paper scale; --model.weights gives another folder.
CHECKPOINT = "checkpoint"
NEW_TEXT, OLD_TEXT = "speeches-2048", "eltec-2048"

_CLIPPED: Mapping[str, Any] = {"optimizer.clip_norm": 1.0}
_ADAM: Mapping[str, Any] = {**_CLIPPED, "optimizer.beta1": 0.9, "optimizer.beta2": 0.999}
_LORA: Mapping[str, Any] = {"model.lora_rank": RANK}


def arms_of(full: Grid, sgd: Grid, lora: Grid) -> tuple[Arm, ...]:
    """Return the arms, all with clipping at 1.

    Args:
        full: Grid of the rate that AdamW would get, if all weights are trained.
        sgd: Grid of SGD's rate.
        lora: Grid of the rate that AdamW would get, if adapters are trained. The grid of SinkGD is
            twice as high, since its best rate was the largest of AdamW's grid.
    """
    ours = {"optimizer.recipe": "sinkgd-finetune"}
    adamw = {"optimizer.recipe": "adamw-one-lr", **_ADAM}
    return (
        Arm("sinkgd", ours, full),
        Arm("sinkgd-plain", {**ours, "optimizer.deflated_rank": 0}, full),
        Arm(
            "rows-only",
            {"optimizer.recipe": "rows-only", **_ADAM},
            full,
            multiples={MATRIX_LR: (LR, ADAMW_UPDATE_SIZE)},
        ),
        Arm(
            "lora-sinkgd",
            {**ours, **_LORA, "optimizer.adapters": "sinkgd", "optimizer.deflated_rank": 0},
            {name: tuple(2 * rate for rate in rates) for name, rates in lora.items()},
        ),
        Arm("adamw", adamw, full, control=True),
        Arm(
            "muon",
            {"optimizer.recipe": "muon", **_ADAM},
            full,
            multiples={MATRIX_LR: (LR, 1.0)},
            control=True,
        ),
        Arm("sgd", {"optimizer.recipe": "sgd", **_CLIPPED}, sgd, control=True),
        Arm("lora-adamw", {**adamw, **_LORA}, lora, control=True),
    )


def _first(run: Run) -> Evaluation:
    """Return the evaluation before the first step."""
    return run.evaluations[0]


def largest_rise(run: Run) -> float:
    """Return the largest rise of the loss on the new text within the first steps, nats."""
    early = [one.val_loss for one in run.evaluations if one.step <= FIRST_STEPS]
    return max(early) - _first(run).val_loss


def old_losses(one: ArmResults) -> list[float]:
    """Return the final losses on the old text, one for each seed that recorded it."""
    found = [result.run.evaluations[-1].other_val_loss for result in one.seeds]
    return [value for value in found if value is not None]


def judge(results: StudyResults) -> Verdict:
    """Compare each candidate with AdamW on the new text; state every arm's losses on both texts."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    adamw, lora = results.arm("adamw"), results.arm("lora-adamw")
    full = [one for one in results.candidates if not one.arm.name.startswith("lora-")]
    best = ranked(full or results.candidates)[0]
    headline = f"{ended(best)} on the new text."
    if adamw is not None:
        headline = compared(best.arm.name, results.difference(best, adamw), "adamw")
    sentences = [
        compared(one.arm.name, results.difference(one, control), control.arm.name)
        for one in results.candidates
        if (control := lora if one.arm.name.startswith("lora-") else adamw) is not None
        and not (one is best and control is adamw)
    ]
    sentences += [_words(one) for one in ranked([*results.candidates, *results.controls])]
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _words(one: ArmResults) -> str:
    """Say how an arm ended on both texts, and whether its loss rose in the first steps."""
    if one.diverged or not (old := old_losses(one)):
        return f"{ended(one)}."
    starts = [_first(result.run) for result in one.seeds]
    before = statistics.fmean(start.other_val_loss or 0.0 for start in starts)
    rise = max(largest_rise(result.run) for result in one.seeds)
    begins = statistics.fmean(start.val_loss for start in starts)
    change = statistics.fmean(old) - before
    shock = (
        f"its loss rose by up to {rise:.3f} within the first {FIRST_STEPS} steps"
        if rise > 0
        else f"its loss never rose within the first {FIRST_STEPS} steps"
    )
    return (
        f"{ended(one)} from {loss(begins)}; on the old text it went from {loss(before)} by "
        f"{change:+.3f}, and {shock}."
    )


def charts(results: StudyResults, identities: Identities) -> list[Chart]:
    """Draw the losses on the new text against those on the old text."""
    arms = [
        (one, old)
        for one in results.ranked
        if one.seeds and not one.diverged and len(old := old_losses(one)) == len(one.seeds)
    ]
    if not arms:
        return []
    before = _first(arms[0][0].seeds[0].run).other_val_loss or 0.0
    return [_forgetting_chart(arms, before, identities)]


def _forgetting_chart(
    arms: Sequence[tuple[ArmResults, Sequence[float]]], before: float, identities: Identities
) -> Chart:
    """Draw the loss on the new text against that on the old text, for every arm.

    Args:
        arms: Arms with seeds, none of them diverged, each with its final losses on the old text,
            one for each seed, nats per token.
        before: Loss on the old text before the first step, nats per token.
        identities: Colors and markers of the arms.
    """
    words = [
        f"{one.arm.name} new {loss(one.loss or 0)}, old {loss(statistics.fmean(old))}"
        for one, old in arms
    ]
    return Chart(
        key="forgetting",
        title="New text against old text",
        caption="Final validation loss on the new text against that on the text of the first "
        "training, for every seed, and their mean with its range. Lower and further left is "
        "better. The line is the loss on the old text before fine-tuning.",
        description="; ".join(words) or "No arm has a result yet.",
        figure={
            "data": [
                trace
                for one, old in arms
                for trace in _two_losses(one, old, identities[one.arm.name])
            ],
            "layout": layout(
                460,
                xaxis=axis("old text, nats per token"),
                yaxis=axis("new text, nats per token"),
                shapes=[
                    {
                        "type": "line",
                        "yref": "paper",
                        "x0": before,
                        "x1": before,
                        "y0": 0,
                        "y1": 1,
                        "line": {"color": "@soft", "width": 1.4, "dash": "dot"},
                    }
                ],
                hovermode="closest",
            ),
        },
        share=1,
    )


def _two_losses(one: ArmResults, old: Sequence[float], look: Identity) -> list[Figure]:
    new = list(one.losses.values())
    mean = statistics.fmean(old)
    return [
        seed_dots(old, new, look),
        {
            "type": "scatter",
            "mode": "markers",
            "name": look.label,
            "x": [mean],
            "y": [one.loss],
            "marker": {"color": look.color, "symbol": look.symbol, "size": 12},
            "error_x": whiskers([mean], [(min(old), max(old))], look),
            "error_y": whiskers([one.loss], [(min(new), max(new))], look),
            "cliponaxis": False,
            "hovertemplate": f"{look.label}<br>old %{{x:.4~g}}<br>new %{{y:.4~g}}<extra></extra>",
        },
    ]


def _shared(weights: str, base: SharedConfig, preset: str | None) -> SharedConfig:
    return replace(
        base,
        model=replace(base.model, preset=preset, weights=weights),
        data=replace(base.data, corpus=NEW_TEXT, vocab_size=None),
        training=replace(
            base.training,
            steps=200,
            batch_size=8,
            warmup_fraction=0.03,
            final_lr_fraction=0.0,
        ),
        evaluation=EvaluationConfig(every_steps=5, tokens=8192, other_corpus=OLD_TEXT),
        checkpoint=replace(base.checkpoint, every_steps=100),
    )


# Each rate is twice the previous one.
FULL: Grid = {LR: (0.0005, 0.001, 0.002, 0.004, 0.008)}
SGD: Grid = {LR: (0.1, 0.2, 0.4, 0.8, 1.6)}
LORA: Grid = {LR: (0.002, 0.004, 0.008, 0.016, 0.032)}
# Rates that are common for models of billions of parameters: 1e-5 is AdamW's, 2e-4 that of LoRA.
PAPER_FULL: Grid = {LR: (2.5e-6, 5e-6, 1e-5, 2e-5, 4e-5)}
PAPER_SGD: Grid = {LR: (0.01, 0.03, 0.1, 0.3, 1.0)}
PAPER_LORA: Grid = {LR: (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)}


# Weights stay float32. In bfloat16, rounding to the nearest would lose most updates at these rates,
# and not every arm can round at random.
def _paper() -> SharedConfig:
    """Return the settings for a model of billions of parameters that the user has in a folder."""
    small = _shared(CHECKPOINT, MACHINE, preset=None)
    return replace(
        small,
        data=replace(small.data, corpus="shards/new"),
        training=replace(
            small.training,
            steps=1000,
            batch_size=64,
            micro_batch_size=8,
            sequence_length=1024,  # the longest that every GPT-2 takes
            precision="bf16-autocast",
            device="auto",
            recompute_activations=True,
        ),
        evaluation=EvaluationConfig(
            every_steps=10, tokens=1_000_000, batch_size=8, other_corpus="shards/old"
        ),
        checkpoint=replace(small.checkpoint, every_steps=250),
    )


FINETUNE = Study(
    name="finetune",
    question="Does SinkGD fine-tune a pretrained model as well as AdamW does, and what does the "
    "model forget?",
    background="A model is trained with one optimizer on one text and fine-tuned with another one "
    "on a second text. Rates are those that AdamW would get; the matrices of sinkgd, sinkgd-plain "
    "and rows-only get 0.3 of them. A report finds Muon worse than Adam at fine-tuning "
    "models that Adam has trained, except with adapters (arXiv 2605.10468).",
    settings={
        "machine": Setting(_shared(WEIGHTS, MACHINE, "gpt2-nano"), arms_of(FULL, SGD, LORA)),
        "paper": Setting(_paper(), arms_of(PAPER_FULL, PAPER_SGD, PAPER_LORA)),
    },
    judge=judge,
    charts=charts,
)
