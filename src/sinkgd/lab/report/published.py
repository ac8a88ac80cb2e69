"""Published figures on the C4 benchmark, each with its source.

None of the figures was measured here. The benchmark is GaLore's: LLaMA on C4 `en`, with 131,072
tokens per step.

Letters, everywhere in this file:
    N: number of a model's parameters
    M: number of parameters in the blocks' matrices
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from sinkgd.lab.models import LLAMAS, LlamaConfig

TOKENS_PER_STEP = 131_072  # 512 sequences of 256 tokens
_GIB = 2**30
_BFLOAT16 = 2  # bytes


class Provenance(Enum):
    """Who ran the runs behind a row's figures."""

    OWN = "authors’ run"  # run by the method's authors
    CITED = "cited"  # printed in one paper, run by the authors of another paper
    OTHERS = "others’ run"  # run by the authors of another method


@dataclass(frozen=True)
class Source:
    """A paper."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        """The address of the paper's abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


ADAM = Source("Adam: A Method for Stochastic Optimization", "1412.6980")
SINKGD = Source(
    "Gradient Multi-Normalization for Stateless and Scalable LLM Training", "2502.06742"
)
GALORE = Source(
    "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", "2403.03507"
)
FIRA = Source(
    "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", "2410.01623"
)
APOLLO = Source("APOLLO: SGD-like Memory, AdamW-level Performance", "2412.05270")
SWAN = Source("SWAN: SGD with Normalization and Whitening", "2412.13148")
RACS = Source(
    "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation", "2502.07752"
)
MUON = Source("Muon is Scalable for LLM Training", "2502.16982")
STABLE_SPAM = Source(
    "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", "2502.17055"
)
SCALE = Source("Memory-Efficient LLM Pretraining via Minimalist Optimizer Design", "2506.16659")


@dataclass(frozen=True)
class Size:
    """A model of the benchmark, and the length of its training."""

    name: str
    preset: str
    steps: int

    @property
    def config(self) -> LlamaConfig:
        """The sizes of the model."""
        return LLAMAS[self.preset]

    @property
    def tokens(self) -> int:
        """Number of tokens of the training, including padding."""
        return self.steps * TOKENS_PER_STEP


SIZES = (
    Size("60M", "llama-60m", 10_000),
    Size("130M", "llama-130m", 20_000),
    Size("350M", "llama-350m", 60_000),
    Size("1.3B", "llama-1b", 100_000),
)
LARGEST = Size("7B", "llama-7b", 150_000)


class State(Enum):
    """State of a method, in numbers per parameter: for the M, for the other N − M, for the head.

    The head is among the other N − M parameters, so the third number is added to the second there.

    Vectors of the length of a row or column are not counted; they are below 0.3 % of the total.
    """

    MOMENTS = (2, 2, 0)  # Adam everywhere
    MATRIX_MOMENTUM = (1, 2, 0)  # Muon in the blocks, Adam outside
    NONE_IN_BLOCKS = (0, 2, 0)  # no state in the blocks, Adam outside
    HEAD_MOMENTUM = (0, 0, 1)  # SCALE
    NOTHING = (0, 0, 0)  # SGD


def memory_gib(size: Size, state: State) -> float:
    r"""Return the memory of weights and state in bfloat16, by the benchmark's formula.

    .. math:: 2\,(N + a M + b (N - M) + c V h) / 2^{30}

    with a, b and c the numbers of ``state``, and :math:`V h` the entries of the head.

    Args:
        size: The model.
        state: The method's state.

    Examples:
        >>> round(memory_gib(SIZES[-1], State.MOMENTS), 3)
        7.483
    """
    config = size.config
    matrices, whole = config.linear_parameter_count, config.parameter_count
    inside, outside, head = state.value
    kept = inside * matrices + outside * (whole - matrices)
    kept += head * config.vocab_size * config.hidden_size
    return _BFLOAT16 * (whole + kept) / _GIB


@dataclass(frozen=True)
class Value:
    """A perplexity on held-out C4, and its precision."""

    perplexity: float
    at_most: bool = False  # whether the paper gives only an upper bound
    from_plot: bool = False  # whether it was read from a plot; the last digit is then a guess


@dataclass(frozen=True)
class Row:
    """A method's perplexities, in the order of `SIZES`; None if nothing is published."""

    key: str
    method: str
    note: str  # distinguishes rows of the same method
    provenance: Provenance
    source: Source  # the paper that has the figures
    values: tuple[Value | None, ...]
    state: State | None  # None if the state depends on a rank
    origin: Source | None = None  # the method's paper, if the figures are from another paper


def _values(*perplexities: float) -> tuple[Value, ...]:
    return tuple(map(Value, perplexities))


_OWN, _CITED, _OTHERS = Provenance.OWN, Provenance.CITED, Provenance.OTHERS

_SINKGD_VALUES = (
    Value(31.0, at_most=True),
    None,
    Value(16.5, from_plot=True),
    Value(13.5, from_plot=True),
)

ROWS = (
    Row("adam-sinkgd", "Adam", "run by SinkGD’s authors", _OTHERS, SINKGD,
        _values(33.94, 25.03, 19.24, 16.44), State.MOMENTS, ADAM),
    Row("adam-galore", "Adam", "GaLore’s, as SinkGD’s authors cite it", _CITED, GALORE,
        _values(34.06, 25.08, 18.80, 15.56), State.MOMENTS, ADAM),
    Row("adam-tuned", "Adam", "tuned by SCALE’s authors", _OTHERS, SCALE,
        _values(30.05, 23.13, 18.77, 16.52), State.MOMENTS, ADAM),
    Row("galore", "GaLore", "", _OWN, GALORE, _values(34.88, 25.36, 18.95, 15.64), None),
    Row("fira", "Fira", "", _OWN, FIRA, _values(31.06, 22.73, 17.03, 14.31), None),
    Row("apollo-mini", "APOLLO-Mini", "", _OWN, APOLLO,
        _values(31.93, 23.84, 17.18, 14.17), State.NONE_IN_BLOCKS),
    Row("apollo-svd", "APOLLO-SVD", "", _OWN, APOLLO, _values(31.26, 22.84, 16.67, 14.10), None),
    Row("swan", "SWAN", "", _OWN, SWAN,
        _values(30.00, 22.83, 17.14, 14.42), State.NONE_IN_BLOCKS),
    Row("racs", "RACS", "", _OWN, RACS,
        _values(30.25, 22.67, 16.51, 13.52), State.NONE_IN_BLOCKS),
    Row("muon", "Muon", "run by SCALE’s authors", _OTHERS, SCALE,
        _values(28.86, 22.20, 16.70, 14.18), State.MATRIX_MOMENTUM, MUON),
    Row("stable-spam", "Stable-SPAM", "run by SCALE’s authors", _OTHERS, SCALE,
        _values(28.77, 22.20, 16.80, 13.97), State.MOMENTS, STABLE_SPAM),
    Row("scale", "SCALE", "", _OWN, SCALE,
        _values(30.81, 22.57, 16.32, 14.25), State.HEAD_MOMENTUM),
    Row("sinkgd", "SinkGD", "", _OWN, SINKGD, _SINKGD_VALUES, State.NONE_IN_BLOCKS),
)  # fmt: skip


@dataclass(frozen=True)
class Longer:
    """Perplexities of one model after each of `LONGER_STEPS`."""

    method: str
    size: str
    source: Source
    values: tuple[float, ...]


LONGER_STEPS = (40_000, 80_000, 120_000, 150_000)
LONGER = (
    Longer("8-bit Adam", "7B", APOLLO, (18.09, 15.47, 14.83, 14.61)),
    Longer("APOLLO-Mini", "7B", APOLLO, (18.03, 14.60, 13.32, 13.09)),
    Longer("RACS", "1.3B", RACS, (16.43, 14.26, 13.20, 13.01)),
)


@dataclass(frozen=True)
class Speedup:
    """Steps of another method to the same loss, per step of SinkGD; tokens have the same ratio."""

    against: str
    size: str
    steps: float


SPEEDUPS = (
    Speedup("Adam", "350M", 2.4),
    Speedup("Adam", "1.3B", 2.8),
    Speedup("SWAN", "350M", 1.3),
    Speedup("SWAN", "1.3B", 1.5),
)
# Tokens to reach Adam's perplexity, as a fraction of Adam's tokens; in the abstract of the NeurIPS
# version.
TOKEN_FRACTION = 0.40

# Tokens per second at 1.3B on eight A100. Effective: all of Adam's tokens, divided by the seconds
# that SinkGD needs to reach Adam's final perplexity.
THROUGHPUT: Mapping[str, float] = MappingProxyType(
    {"Adam": 53_000.0, "SinkGD": 58_000.0, "SinkGD, effective": 161_800.0}
)
THROUGHPUT_GPUS = 8

# Memory in GB at 1.3B and a batch of 256, measured by GaLore's authors.
MEASURED_GB: Mapping[str, float] = MappingProxyType(
    {"AdamW": 13.60, "8-bit Adam": 9.54, "8-bit GaLore, layer by layer": 5.63}
)

AGAINST = (
    "A tuned Adam removes the gain at 60M: 30.05, against at most 31.0 for SinkGD and 33.94 for "
    "the Adam that SinkGD’s authors ran.",
    "Two independent reports, at 30M and at 1.3B, find plain SinkGD behind AdamW, and worse at "
    "larger batches.",
)
