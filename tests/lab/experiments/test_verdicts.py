"""Each judge on made-up results: every outcome has its words."""

from dataclasses import replace

import pytest

from lab.experiments.synthetic_study import SESSION, made_up, made_up_record
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import with_cost

INF = float("inf")
NOISE = (0.000, 0.004, -0.003)


def near(mean):
    """Three seeds with a small common spread."""
    return [mean + noise for noise in NOISE]


def apart(mean):
    """Three seeds that differ from `near` in no common direction."""
    return [mean + noise for noise in (0.02, -0.03, 0.01)]


def judge(name, losses, **options):
    return STUDIES[name].judge(made_up(STUDIES[name], losses, **options))


ITERATIONS = [
    (
        {"L1": [5.0], "L5": [4.0]},
        "L5 ended at 4.000, the lowest; more seeds are needed to compare the others with it.",
    ),
    (
        {"L1": near(4.30), "L3": near(4.20), "L5": near(4.10)},
        "L5 ended at 4.100, lower than every other number of iterations.",
    ),
    (
        {"L1": near(4.30), "L5": near(4.10), "L10": apart(4.11)},
        "L5 is enough: more iterations end no lower.",
    ),
    (
        {"L1": near(4.30), "L3": apart(4.101), "L5": near(4.1)},
        "L3 is enough: it is level with L5, the lowest.",
    ),
    (
        {"L1": apart(4.101), "L3": near(4.1)},
        "L1 is enough: no number of iterations ends lower, beyond the spread of seeds.",
    ),
    ({"L1": near(4.3)}, "L1 ended at 4.300; no other number of iterations has a result."),
    ({"adamw": near(4.3)}, "No arm that the question is about has a result yet."),
]


@pytest.mark.parametrize(("losses", "headline"), ITERATIONS)
def test_iterations(losses, headline):
    assert judge("iterations", losses).headline == headline


def test_the_best_is_compared_with_every_control_at_equal_tokens_and_seconds():
    losses = {"L1": near(4.1), "L5": near(4.0), "adamw": near(4.05), "adamw-one-lr": apart(4.0)}
    said = judge("iterations", losses, step_seconds={"L5": 2.0}).sentences
    assert "L5 ended 0.050 ± 0.000 lower than adamw." in said
    assert any(one.startswith("L5 is level with adamw-one-lr: the difference is") for one in said)
    # After 100 of its 200 seconds L5 has done 50 of its 100 steps.
    assert any("At equal seconds" in one and "L5 4.600, adamw 4.050" in one for one in said)


@pytest.mark.parametrize(
    ("losses", "headline", "sentence"),
    [
        (
            {
                "sinkgd-paper-alpha0.025": near(4.1),
                "sinkgd-paper-alpha0.05": near(4.0),
                "sinkgd-paper-alpha0.1": near(4.2),
            },
            "sinkgd-paper-alpha0.05 ended at 4.000, the lowest.",
            "The lowest loss of sinkgd-paper is at the published α.",
        ),
        (
            {
                "sinkgd-paper-alpha0.025": near(4.0),
                "sinkgd-paper-alpha0.05": near(4.1),
                "sinkgd-paper-alpha0.1": near(4.2),
            },
            "sinkgd-paper-alpha0.025 ended at 4.000, the lowest.",
            "sinkgd-paper-alpha0.05 ended 0.100 ± 0.000 higher than sinkgd-paper-alpha0.025.",
        ),
        (
            {
                "sinkgd-paper-alpha0.025": near(4.0),
                "sinkgd-paper-alpha0.05": apart(4.001),
                "sinkgd-paper-alpha0.1": near(4.2),
            },
            "sinkgd-paper-alpha0.025 ended at 4.000, the lowest; level with it: "
            "sinkgd-paper-alpha0.05.",
            "sinkgd-paper-alpha0.05 is level with sinkgd-paper-alpha0.025: the difference is "
            "+0.001 ± 0.073.",
        ),
    ],
)
def test_alpha(losses, headline, sentence):
    verdict = judge("alpha", losses)
    assert verdict.headline == headline
    assert sentence in verdict.sentences
    at_edge = any("edge of what was tried" in caution for caution in verdict.cautions)
    assert at_edge == ("sinkgd-paper-alpha0.025 ended" in headline)


def test_alpha_is_judged_for_each_recipe():
    losses = {
        "sinkgd-paper-alpha0.025": near(4.1),
        "sinkgd-paper-alpha0.05": near(4.0),
        "sinkgd-paper-alpha0.1": near(4.2),
        "sinkgd-alpha0.025": near(4.0),
        "sinkgd-alpha0.05": near(3.9),
        "sinkgd-alpha0.1": near(3.8),
    }
    verdict = judge("alpha", losses)
    assert verdict.headline == "sinkgd-alpha0.1 ended at 3.800, the lowest."
    assert verdict.sentences[:2] == (
        "The lowest loss of sinkgd-paper is at the published α.",
        "sinkgd-alpha0.05 ended 0.100 ± 0.000 higher than sinkgd-alpha0.1.",
    )
    edges = [one for one in verdict.cautions if "edge of what was tried" in one]
    assert edges == [
        "The best α is at the edge of what was tried: sinkgd-alpha0.1. Try more with --alpha."
    ]


def test_ablation_compares_each_normalization_with_both():
    losses = {"sinkgd-paper": near(4.0), "rows-only": near(4.1), "sign": apart(4.001)}
    verdict = judge("ablation", losses)
    assert verdict.headline == "sinkgd-paper ended at 4.000, the lowest; level with it: sign."
    assert "rows-only ended 0.100 ± 0.000 higher than sinkgd-paper." in verdict.sentences
    alone = judge("ablation", {"swan": near(3.9), "sinkgd-paper": near(4.0)})
    assert alone.headline == "swan ended at 3.900, the lowest beyond the spread of seeds."
    assert "swan ended 0.100 ± 0.000 lower than sinkgd-paper." in alone.sentences


@pytest.mark.parametrize(
    ("adamw", "headline"),
    [
        (
            (4.1, 4.1),
            "The paper’s SinkGD ends lower than the fair AdamW at a batch of 4, 16 sequences.",
        ),
        (
            (4.1, 3.9),
            "The paper’s SinkGD ends lower than the fair AdamW at a batch of 4 and ends higher "
            "than the fair AdamW at a batch of 16 sequences.",
        ),
        (
            (4.1, None),
            "The paper’s SinkGD ends lower than the fair AdamW at a batch of 4 sequences, "
            "level elsewhere.",
        ),
        (
            (None, None),
            "The paper’s SinkGD and the fair AdamW are level at every batch that has results.",
        ),
    ],
)
def test_batch(adamw, headline):
    losses = {}
    for size, mean in zip((4, 16), adamw, strict=True):
        losses[f"sinkgd-paper-batch{size}"] = near(4.0)
        losses[f"adamw-batch{size}"] = apart(4.0) if mean is None else near(mean)
    assert judge("batch", losses).headline == headline


def test_each_recipe_has_a_standing_of_its_own_over_batches():
    losses = {}
    for size in (4, 16):
        losses |= {
            f"sinkgd-paper-batch{size}": apart(4.0),
            f"sinkgd-batch{size}": near(3.9),
            f"adamw-batch{size}": near(4.0),
        }
    verdict = judge("batch", losses)
    assert verdict.headline == (
        "The paper’s SinkGD and the fair AdamW are level at every batch that has results. "
        "SinkGD with deflation ends lower than the fair AdamW at a batch of 4, 16 sequences."
    )
    assert "sinkgd-batch4 ended 0.100 ± 0.000 lower than adamw-batch4." in verdict.sentences
    assert any("lower than sinkgd-paper-batch16." in one for one in verdict.sentences)


def test_a_batch_without_its_control_says_so():
    verdict = judge("batch", {"sinkgd-paper-batch4": near(4.0)})
    headline = "The paper’s SinkGD and the fair AdamW have no results at the same batch yet."
    assert verdict.headline == headline


def cautions(losses, **options):
    return " ".join(judge("iterations", losses, **options).cautions)


def test_a_best_point_at_the_edge_of_its_grid_is_a_caution():
    losses = {"L1": near(4.1), "L5": near(4.0)}
    at_edge = "at its edge for L5 (optimizer.matrix_lr = 0.00025): a wider grid may lower"
    assert at_edge in cautions(losses, best={"L5": 0})
    assert "L5 (optimizer.matrix_lr = 0.008)" in cautions(losses, best={"L5": 5})
    assert "edge" not in cautions(losses)  # a rate with one value was not searched


def test_grids_that_grew_to_different_numbers_of_points_are_a_caution():
    study, losses = STUDIES["table1"], {"sinkgd": near(4.0), "adamw": near(4.1)}
    record = made_up_record(study, losses)
    assert "Grids grew" not in " ".join(study.judge(StudyResults.of(record)).cautions)
    del record.runs[next(name for name in record.runs if name.startswith("adamw-tune"))]
    said = " ".join(study.judge(StudyResults.of(record)).cautions)
    assert "Grids grew to 2 to 3 points, of one run each." in said


def test_few_seeds_no_tuning_divergence_and_missing_seeds_are_cautions():
    assert "A single seed" in cautions({"L1": [4.0], "L5": [4.1]})
    assert "Two seeds" in cautions({"L1": [4.0, 4.1]})
    ladder = {f"sinkgd-{size}": near(4.0) for size in ("nano-32", "nano-64", "nano-96")}
    few = "sinkgd-nano-64 and sinkgd-nano-96 have fewer than three seeds"
    assert few in " ".join(judge("ladder", ladder).cautions)
    assert "Nothing was tuned" in cautions({"L1": near(4.0)}, tune=False)
    assert "L1 diverged in 1 of 3 seeds." in cautions({"L1": [4.0, INF, 4.1], "L5": near(4.0)})
    assert "Not finished: L5 has not run every seed" in cautions({"L1": near(4.0), "L5": [4.0]})
    assert "Machine scale: llama-nano" in cautions({"L1": near(4.0)})


@pytest.mark.parametrize(
    ("processors", "warned"),
    [([], False), (["A", "A"], False), (["A", "B", "A"], True), ([None, "A"], False)],
)
def test_sessions_on_different_processors_are_a_caution(processors, warned):
    study = STUDIES["iterations"]
    record = made_up_record(study, {"L1": near(4.1), "L5": near(4.0)})
    environments = [{} if cpu is None else {"cpu": cpu} for cpu in processors]
    record.sessions = [replace(SESSION, environment=one) for one in environments]
    said = " ".join(study.judge(StudyResults.of(record)).cautions)
    assert ("ran on different processors (A; B): the times" in said) == warned


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_one_seed_calls_no_two_arms_level_or_different(name):
    study = STUDIES[name]
    arms = study.settings["machine"].arms
    results = made_up(study, {arm.name: [5 - 0.05 * i] for i, arm in enumerate(arms)})
    verdict = with_cost(results, study.judge(results))
    said = " ".join([verdict.headline, *verdict.sentences])
    for words in ("is level with", "level with it:", "are level", "helps", "harms", "of its time"):
        assert words not in said, said


def test_an_arm_that_diverged_is_not_the_best():
    verdict = judge("iterations", {"L1": [4.0, INF, 4.0], "L5": near(4.2), "adamw": [INF] * 3})
    assert verdict.headline.startswith("L5 ended at 4.2")
    assert "L5 diverged in 0 of 3 seeds, adamw in 3." in verdict.sentences
