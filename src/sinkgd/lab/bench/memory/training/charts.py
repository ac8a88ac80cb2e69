"""The peaks of training steps as charts: one a model, a bar a case."""

from sinkgd.lab.bench.charts import stacked_bars
from sinkgd.lab.bench.memory.training.records import TrainingMemory, TrainingUse
from sinkgd.lab.bench.memory.training.sheets import settings_in_words
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.quantities import ratio

# Part, strength of its color, and its field.
_PARTS = (
    ("weights", 1.0, "weights_bytes"),
    ("state", 0.75, "state_bytes"),
    ("gradients", 0.52, "gradients_bytes"),
    ("rest", 0.33, "rest_bytes"),
    ("activations", 0.17, "activations_bytes"),
)


def training_charts(memory: TrainingMemory) -> list[Chart]:
    """Draw what the peak of each case consists of, in sizes of the weights."""
    models = dict.fromkeys(use.model for use in memory.uses)
    return [_chart(memory, model) for model in models]


def _chart(memory: TrainingMemory, model: str) -> Chart:
    uses = [use for use in memory.uses if use.model == model]
    words = [ratio(use.peak_bytes / use.weights_bytes) for use in uses]
    described = "; ".join(f"{u.title} {word}" for u, word in zip(uses, words, strict=True))
    return Chart(
        key=f"training-{model}",
        title=f"Peak of a training step of {model}, bfloat16",
        caption=f"What was allocated at the peak, in sizes of the weights; "
        f"{settings_in_words(memory)}.",
        description=f"{described}.",
        figure=stacked_bars(
            [use.title for use in uses],
            words,
            [
                (name, strength, [_of_weights(u, part) for u in uses])
                for name, strength, part in _PARTS
            ],
        ),
    )


def _of_weights(use: TrainingUse, part: str) -> float:
    share: float = getattr(use, part) / use.weights_bytes
    return share
