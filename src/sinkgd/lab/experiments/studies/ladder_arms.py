"""The arms of the study `ladder`: methods, sizes, and the rules by which they are trained.

Rules (at the paper's scale, tokens and batch are instead those of the benchmark):
    tokens: 20 for each hidden weight, so that the training takes C ∝ N² operations
    batch: grows as the square root of the tokens, and so does the number of steps
    rates: each method is tuned at the two smallest sizes, on grids that grow until their best point
        is inside. Larger models take the method's best rates at the second smallest size, but the
        rate of matrices shrinks as 1/d with the width d. That is a compromise: in study `width` the
        largest good rate falls with the width, but the fall is known only roughly, and AdamW's is
        unknown. Muon's rate does not shrink, because Muon scales its updates by the shape of the
        matrix. At the largest size, the resulting rate of matrices, its half and its double are
        tried.

Letters:
    N: number of hidden weights, which are those of the blocks' matrices

There are two AdamWs, with a beta1 of 0.9 and of 0.5, and two Muons, with a momentum of 0.95 and of
0.5.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Carried, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MATRIX_LR
from sinkgd.lab.models.presets import preset_config
from sinkgd.lab.train.config import SharedConfig

TOKENS_PER_WEIGHT = 20
SIZES = ("llama-nano-32", "llama-nano-48", "llama-nano-64", "llama-nano-96")
PAPER_SIZES = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
FAR_PRESET = "llama-60m"  # the model to which the trend of smaller ones is extrapolated
SEEDS = (3, 3, 2, 2)  # by size
CHECKED = (0.5, 1.0, 2.0)  # multiples of the carried rate that the largest size tries
SMALLEST_BATCH = 16  # sequences at the smallest size

# The recipe of each method, and what else defines it.
METHODS: Mapping[str, Mapping[str, str | float]] = {
    "sinkgd": {"optimizer.recipe": "sinkgd"},
    "sinkgd-paper": {"optimizer.recipe": "sinkgd-paper"},
    "adamw": {"optimizer.recipe": "adamw"},
    "adamw-0.5": {"optimizer.recipe": "adamw", "optimizer.beta1": 0.5},
    "muon": {"optimizer.recipe": "muon"},
    "muon-0.5": {"optimizer.recipe": "muon", "optimizer.momentum": 0.5},
}
ADAMWS = ("adamw", "adamw-0.5")
COMPARED = tuple(method for method in METHODS if method not in ADAMWS)  # with the better AdamW
_NOT_BY_WIDTH = {"muon", "muon-0.5"}

# Three rates of matrices at the two smallest sizes, each twice the previous one. As the grids grow,
# they get other rates of embeddings and head, too.
GRIDS: Mapping[str, Grid] = {
    "sinkgd": {LR: (0.08,), MATRIX_LR: (0.002, 0.004, 0.008)},
    "sinkgd-paper": {LR: (0.08,), MATRIX_LR: (0.001, 0.002, 0.004)},
    "adamw": {LR: (0.08,), MATRIX_LR: (0.003, 0.006, 0.012)},
    "adamw-0.5": {LR: (0.08,), MATRIX_LR: (0.003, 0.006, 0.012)},
    "muon": {LR: (0.08,), MATRIX_LR: (0.01, 0.02, 0.04)},
    "muon-0.5": {LR: (0.08,), MATRIX_LR: (0.01, 0.02, 0.04)},
}
PAPER_GRIDS: Mapping[str, Grid] = {
    "sinkgd": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002)},
    "sinkgd-paper": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002)},
    "adamw": {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.004)},
    "adamw-0.5": {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.004)},
    "muon": {LR: (0.02,), MATRIX_LR: (0.005, 0.01, 0.02)},
    "muon-0.5": {LR: (0.02,), MATRIX_LR: (0.005, 0.01, 0.02)},
}


def hidden_weights(preset: str) -> int:
    """Return N of a preset."""
    return preset_config(preset).linear_parameter_count


def machine_sizes(presets: Sequence[str], shared: SharedConfig) -> dict[str, dict[str, Any]]:
    """Return each preset's batch and steps by the rules above, with some 20 evaluations."""
    length, least = shared.training.sequence_length, hidden_weights(presets[0])
    found = {}
    for preset in presets:
        tokens = TOKENS_PER_WEIGHT * hidden_weights(preset)
        batch = round(SMALLEST_BATCH * math.sqrt(hidden_weights(preset) / least) / 4) * 4
        steps = round(tokens / (batch * length))
        found[preset] = {
            "training.batch_size": batch,
            "training.steps": steps,
            "evaluation.every_steps": max(1, steps // 20),
            "checkpoint.every_steps": max(1, steps // 10),
        }
    return found


def paper_sizes(presets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each preset's steps and batches in the benchmark.

    The benchmark has about 20 tokens for each weight of a model, but only 10 for llama-1b.
    """
    return {
        preset: {
            "training.steps": one.training.steps,
            "training.micro_batch_size": one.training.micro_batch_size,
            "evaluation.batch_size": one.evaluation.batch_size,
        }
        for preset in presets
        for one in [BENCHMARK[preset]]
    }


def arms(sizes: Mapping[str, Mapping[str, Any]], grids: Mapping[str, Grid]) -> tuple[Arm, ...]:
    """Return one arm per method and size, from the smallest size on."""
    presets = list(sizes)
    tuned = presets[1]  # the size whose rates larger ones take
    found = []
    for place, preset in enumerate(presets):
        for method, overrides in METHODS.items():
            narrower = preset_config(tuned).hidden_size / preset_config(preset).hidden_size
            factor = 1.0 if method in _NOT_BY_WIDTH else narrower
            last = place == len(presets) - 1
            found.append(
                Arm(
                    f"{method}-{preset.removeprefix('llama-')}",
                    {"model.preset": preset, **overrides, **sizes[preset]},
                    grids[method] if place < 2 else {},
                    value=float(hidden_weights(preset)),
                    control=method not in ("sinkgd", "sinkgd-paper"),
                    series=method,
                    widened=place < 2,
                    carried=None
                    if place < 2
                    else Carried(
                        f"{method}-{tuned.removeprefix('llama-')}",
                        {MATRIX_LR: factor},
                        CHECKED if last else (1.0,),
                    ),
                    seeds=SEEDS[place],
                )
            )
    return tuple(found)
