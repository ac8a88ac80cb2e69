"""Build everything that training needs from a configuration: text, model, optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from sinkgd import kernels
from sinkgd.kernels.cpu.launch import cache_is_shared, compile_loops, loops_are_compiled
from sinkgd.lab.data import (
    Batches,
    DataError,
    Manifest,
    Progress,
    TokenDataset,
    TokenSplit,
    VocabularyShift,
    prepared_corpus,
    shards_at,
)
from sinkgd.lab.data.documents import expanded
from sinkgd.lab.data.tokenizer import VOCAB_SIZE
from sinkgd.lab.models import (
    LanguageModel,
    ModelSizes,
    add_adapters,
    draw_adapters,
    model_of,
    preset_config,
)
from sinkgd.lab.results import RunStart
from sinkgd.lab.train.config import ConfigError, DataConfig, ModelConfig, RunConfig
from sinkgd.lab.train.folder import RunFolder
from sinkgd.lab.train.identity import (
    WEIGHTS,
    check_content,
    check_data,
    content_of,
    knows_its_text,
    recorded_sizes,
    with_absolute_paths,
)
from sinkgd.lab.train.machine import (
    keep_freed_memory,
    return_freed_memory,
    select_device,
    set_threads,
    weight_dtype,
)
from sinkgd.lab.train.mesh import Mesh, form_mesh, shard_model
from sinkgd.lab.train.recipes import build_optimizer
from sinkgd.lab.train.resolve import check_micro_batches, check_ranks, check_shares
from sinkgd.lab.train.starting_weights import StartingWeights
from sinkgd.lab.train.state import TrainingState
from sinkgd.lab.train.training_step import ReleasedSteps
from sinkgd.lab.train.world import World
from sinkgd.optim.grouped import GroupedOptimizer

_STAGES = {
    "tokenizer": "training a tokenizer on {} (once; it is cached)",
    "tokens": "tokenizing {} (once; it is cached)",
}


@dataclass(frozen=True)
class Job:
    """A run that is ready to train."""

    config: RunConfig
    mesh: Mesh
    batches: Batches
    validation: TokenSplit
    other_validation: TokenSplit | None  # held-out text of evaluation.other_corpus
    tokens_per_byte: float  # of the validation text
    state: TrainingState
    content: Mapping[str, Any]  # compared when the run is resumed
    released: ReleasedSteps | None = None  # the steps inside backward, if gradients are released
    shift: VocabularyShift | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.mesh.device

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, tied ones counted once."""
        return sum(p.numel() for p in self.state.model.parameters() if p.requires_grad)


def set_up(
    config: RunConfig,
    echo: Callable[[str], None],
    world: World | None = None,
    *,
    begun: RunStart | None = None,
    restored: bool = False,
) -> Job:
    """Prepare the text, build the model and the optimizer; a collective call.

    Args:
        config: The resolved configuration.
        echo: Called with each line of messages for the user.
        world: The ranks that train together; by default only this process.
        begun: First record of the run to resume, for comparison; None for a new run.
        restored: Whether a checkpoint of that run will replace the weights, so that the folder of
            ``model.weights`` is not needed.

    Raises:
        ConfigError: If text, model, mesh, recipe and ``model.weights`` do not match, the device is
            absent, or the run to resume had another text, model, recipe or starting weights.
        DataError: If the corpus is missing, damaged or too small.
        ModelError: If a Hugging Face checkpoint in ``model.weights`` cannot be read.
        CheckpointError: If all checkpoints in ``model.weights`` are damaged.
    """
    training = config.training
    set_threads(training.threads)
    if training.release_gradients:
        return_freed_memory()
    else:
        keep_freed_memory()
    torch.manual_seed(training.seed)
    world = World() if world is None else world
    check_ranks(config.optimizer, world.size)
    mesh = form_mesh(config.mesh, world, select_device(training.device))
    check_shares(training, mesh.parts)
    check_micro_batches(config, mesh.parts)
    dataset = world.first_before_others(lambda: open_dataset(config.data, echo))
    manifest = dataset.manifest
    if begun is not None:
        check_data(begun, manifest, config.data.corpus)
    batches = Batches(
        dataset.split("train"),
        sequence_length=training.sequence_length,
        batch_size=training.batch_size,
        seed=training.seed,
        packing=config.data.packing,
        rank=mesh.part,
        world_size=mesh.parts,
    )
    other = _other_dataset(config, manifest, world, echo)
    weights = None if restored else world.from_first(lambda: _starting_weights(config))
    for note in () if weights is None else weights.notes:
        echo(note)
    sizes = _model_sizes(config, manifest, weights, begun)
    model = _initialized_model(config, sizes, manifest, mesh, weights)
    optimizer = build_optimizer(model, config.optimizer)
    world.first_before_others(lambda: _compile_loops(optimizer, mesh.device, echo))
    sha256 = None if weights is None else weights.sha256
    if restored and begun is not None:
        sha256 = begun.inputs.get(WEIGHTS)
    content = content_of(
        manifest,
        model,
        optimizer,
        weights_sha256=sha256,
        other=None if other is None else other.manifest,
    )
    if begun is not None:
        check_content(begun, content)
    validation = manifest.splits["validation"]
    return Job(
        config=config,
        mesh=mesh,
        batches=batches,
        validation=dataset.split("validation"),
        other_validation=None if other is None else other.split("validation"),
        tokens_per_byte=validation.tokens / validation.text_bytes,
        state=TrainingState(model, optimizer),
        content=content,
        released=ReleasedSteps(optimizer) if training.release_gradients else None,
        shift=_shift(config, manifest),
    )


def _starting_weights(config: RunConfig) -> StartingWeights | None:
    folder = config.model.weights
    if folder is None:
        return None
    return StartingWeights.find(expanded(folder), config.training.sequence_length)


def _model_sizes(
    config: RunConfig,
    manifest: Manifest,
    weights: StartingWeights | None,
    begun: RunStart | None,
) -> ModelSizes:
    """Return the sizes of the preset, or of the weights, or of the run to resume."""
    model = config.model
    if model.preset is not None:
        return preset_config(
            model.preset,
            vocab_size=_vocab_size(model, manifest),
            max_sequence_length=config.training.sequence_length,
        )
    if weights is not None:
        sizes = weights.sizes
    else:
        assert begun is not None, "a run without preset and weights has a checkpoint"
        sizes = recorded_sizes(begun)
    if model.vocab_size is not None:
        sizes = replace(sizes, vocab_size=model.vocab_size)  # refused later if the weights differ
    return sizes


def _other_dataset(
    config: RunConfig, manifest: Manifest, world: World, echo: Callable[[str], None]
) -> TokenDataset | None:
    """Open the text in ``evaluation.other_corpus``, if there is one.

    Raises:
        ConfigError: If the tokenizer of that text is not the one of the run's text.
    """
    corpus = config.evaluation.other_corpus
    if corpus is None:
        return None
    data = replace(config.data, corpus=corpus)
    other = world.first_before_others(lambda: open_dataset(data, echo))
    if other.manifest.tokenizer_sha256 != manifest.tokenizer_sha256:
        raise ConfigError(
            f"evaluation.other_corpus is {corpus!r}, whose tokenizer differs from that of "
            f"data.corpus {config.data.corpus!r}. Prepare one text with the tokenizer of the other "
            "one: sinkgd prepare TEXT --tokenizer FOLDER/tokenizer.json --out SHARDS"
        )
    return other


def _initialized_model(
    config: RunConfig,
    sizes: ModelSizes,
    manifest: Manifest,
    mesh: Mesh,
    weights: StartingWeights | None,
) -> LanguageModel:
    training = config.training
    with torch.device("meta"):  # weights are initialized later, one by one, in their final type
        model = model_of(sizes)
    if weights is not None:
        weights.check(sizes, manifest)
    if config.model.lora_rank:
        add_adapters(model, config.model.lora_rank)
    model.to(weight_dtype(training.precision))
    shard_model(model, mesh, sequence_length=training.sequence_length)
    model.to_empty(device=mesh.device)
    if weights is None:
        model.initialize(training.seed)
    else:
        weights.load(model, mesh.world)
    draw_adapters(model, training.seed)
    model.recompute = training.recompute_activations
    return model


def _compile_loops(optimizer: Optimizer, device: torch.device, echo: Callable[[str], None]) -> None:
    """Compile the CPU backend's loops now, if the optimizer uses them.

    Without this call the first step would compile them, which would count as training time.
    """
    if not isinstance(optimizer, GroupedOptimizer):
        return
    # A group names its backend; a group without one checks gradients for NaN with "auto".
    names = {group.get("backend", "auto") for group in optimizer.param_groups}
    if all(kernels.select(name, device).name != "cpu" for name in names):
        return
    if not loops_are_compiled():
        kept = "once; they are cached" if cache_is_shared() else "no folder can keep them"
        echo(f"compiling the loops of the optimizer for this processor ({kept})")
    compile_loops()


def check_finished(folder: RunFolder, config: RunConfig, echo: Callable[[str], None]) -> None:
    """Refuse a configuration whose text differs from that of a finished run.

    This is not checked if the run recorded no hash of its text, or if that text cannot be opened
    any more.

    Raises:
        ConfigError: If the texts differ; the message gives both hashes.
        DataError: If a text other than the run's is configured, and cannot be opened.
    """
    start = folder.start()
    if not knows_its_text(start):
        return
    try:
        dataset = open_dataset(config.data, echo)
    except DataError:
        if with_absolute_paths(config).data.corpus == folder.config_of(start).data.corpus:
            return
        raise
    check_data(start, dataset.manifest, config.data.corpus)


def open_dataset(data: DataConfig, echo: Callable[[str], None]) -> TokenDataset:
    """Open the shards of the configured text, and prepare them first if they do not exist.

    Raises:
        ConfigError: If the given vocabulary size differs from that of prepared shards.
        DataError: If the corpus is missing, damaged or too short.
    """
    reported: set[str] = set()

    def report(progress: Progress) -> None:
        if progress.stage not in reported:
            reported.add(progress.stage)
            echo(_STAGES[progress.stage].format(data.corpus))

    vocab_size = VOCAB_SIZE if data.vocab_size is None else data.vocab_size
    folder = prepared_corpus(data.corpus, vocab_size=vocab_size, progress=report, say=echo)
    dataset = TokenDataset.open(folder)
    found = dataset.manifest.vocab_size
    # A tokenizer trained here may have fewer tokens than asked for, if the text is short.
    prepared_before = shards_at(data.corpus) is not None
    if prepared_before and data.vocab_size not in (None, found):
        raise ConfigError(
            f"data.vocab_size is {data.vocab_size}, but the tokenizer of {folder} has {found} "
            "tokens; leave it out, or run `sinkgd prepare` for another tokenizer"
        )
    return dataset


def _shift(config: RunConfig, manifest: Manifest) -> VocabularyShift | None:
    if config.data.shift_at_step is None:
        return None
    special = (manifest.eos_id, manifest.pad_id, manifest.bos_id)
    return VocabularyShift.drawn(
        config.data.shift_at_step,
        vocab_size=manifest.rows_needed,
        keep={i for i in special if i is not None},
        seed=config.training.seed,
    )


def _vocab_size(model: ModelConfig, text: Manifest) -> int:
    rows = text.vocab_size if model.vocab_size is None else model.vocab_size
    if rows >= text.rows_needed:
        return rows
    if text.largest_id is None:
        why = (
            f"the tokenizer has {text.vocab_size} tokens, and these shards do not say which of "
            "them occur; either run `sinkgd prepare` again, which records this, or"
        )
    else:
        why = f"the text has ids up to {text.rows_needed - 1}, and each needs a row;"
    raise ConfigError(
        f"model.vocab_size is {rows}, but {why} give at least {text.rows_needed}, or leave it out"
    )
