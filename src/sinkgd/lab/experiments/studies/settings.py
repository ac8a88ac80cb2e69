"""The two scales of the studies, and their controls with grids of equal size.

The paper's scale is the benchmark of Zhao et al. 2024 (GaLore), which Scetbon et al. 2025 use, too:
C4, documents cut or padded to rows of 256 tokens, 512 rows per step, weights in bfloat16.
"""

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.report.published import SIZES
from sinkgd.lab.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    SharedConfig,
    TrainingConfig,
)

# About 50 s of one core per run: llama-nano on 491,520 tokens of the embedded corpus.
MACHINE = SharedConfig(
    model=ModelConfig(preset="llama-nano"),
    data=DataConfig(vocab_size=2048),
    training=TrainingConfig(
        steps=240, batch_size=16, sequence_length=128, precision="float32", device="cpu"
    ),
    evaluation=EvaluationConfig(every_steps=24, tokens=16_384),
    checkpoint=CheckpointConfig(every_steps=60, keep=1),
    logging=LoggingConfig(print_every_steps=60),
)

_STEPS = {size.preset: size.steps for size in SIZES}
_MICRO_BATCH = {"llama-60m": 256, "llama-130m": 128, "llama-350m": 128, "llama-1b": 32}
# The batch of GaLore's evaluator over all its devices; galore_perplexity depends on it.
_EVALUATION_BATCH = {"llama-60m": 256, "llama-130m": 256, "llama-350m": 512, "llama-1b": 128}


def paper(preset: str = "llama-60m") -> SharedConfig:
    """Return the benchmark's configuration for one of its models, as in ``benchmarks/c4``."""
    return SharedConfig(
        model=ModelConfig(preset=preset, vocab_size=32_000),  # T5's 32,100 without its sentinels
        data=DataConfig(corpus="shards/c4", packing="none"),
        training=TrainingConfig(
            steps=_STEPS[preset],
            batch_size=512,
            micro_batch_size=_MICRO_BATCH[preset],
            sequence_length=256,
            precision="bf16",
            device="auto",
        ),
        evaluation=EvaluationConfig(
            every_steps=1000, tokens=10_000_000, batch_size=_EVALUATION_BATCH[preset]
        ),
        checkpoint=CheckpointConfig(every_steps=1000, keep=1),
        logging=LoggingConfig(print_every_steps=100),
    )


BENCHMARK = {preset: paper(preset) for preset in _STEPS}

LR, MATRIX_LR = "optimizer.lr", "optimizer.matrix_lr"

# Six points each, a factor of two apart. All parameters except matrices have the same rate with
# SinkGD and the fair AdamW: 0.08 was the best for both in benchmarks/learning_rates.
SINKGD_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)}
ADAMW_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024)}
ONE_LR_GRID: Grid = {LR: (0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024)}

# SinkGD's published rates are 0.02, and 0.001 for matrices; the benchmark's own grid for AdamW is
# from 1e-4 to 1e-2 (Zhao et al. 2024, appendix C).
PAPER_SINKGD_GRID: Grid = {LR: (0.02,), MATRIX_LR: (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)}
PAPER_ADAMW_GRID: Grid = {LR: (0.02,), MATRIX_LR: (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)}
PAPER_ONE_LR_GRID: Grid = {LR: (0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01)}
# The best matrix rates of SWAN and Muon are higher, so their grids have higher rates, too.
SWAN_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)}
PAPER_SWAN_GRID: Grid = {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)}
MUON_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)}
PAPER_MUON_GRID: Grid = {LR: (0.02,), MATRIX_LR: (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)}


def controls(adamw: Grid = ADAMW_GRID, one_lr: Grid = ONE_LR_GRID) -> tuple[Arm, ...]:
    """Return the fair AdamW and the papers' AdamW, with grids of equal size.

    The fair AdamW clips gradients and has a separate rate for hidden matrices.
    """
    return (
        Arm("adamw", {"optimizer.recipe": "adamw"}, adamw, control=True),
        Arm("adamw-one-lr", {"optimizer.recipe": "adamw-one-lr"}, one_lr, control=True),
    )


def muon(grid: Grid = MUON_GRID) -> Arm:
    """Return Muon, which stores one number per matrix entry, with its grid."""
    return Arm("muon", {"optimizer.recipe": "muon"}, grid, control=True)


def paper_controls() -> tuple[Arm, ...]:
    """Return both AdamWs at the paper's scale."""
    return controls(PAPER_ADAMW_GRID, PAPER_ONE_LR_GRID)
