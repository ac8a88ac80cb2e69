"""The weights that a run begins with: those of another run, or of a Hugging Face checkpoint."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sinkgd.lab.data import Manifest, shards_at
from sinkgd.lab.data.dataset import TOKENIZER_FILE
from sinkgd.lab.data.documents import EMBEDDED, expanded
from sinkgd.lab.data.tokenizer import Tokenizer
from sinkgd.lab.models import LanguageModel, LlamaConfig, ModelSizes
from sinkgd.lab.models.huggingface import CONFIG_FILE, read_config
from sinkgd.lab.models.huggingface_tensors import content_sha256, load_tensors
from sinkgd.lab.results import ResultsError, Run
from sinkgd.lab.train.checkpoint import load_weights
from sinkgd.lab.train.checkpoint_validation import CHECKSUMS, latest_valid
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.folder import RunFolder
from sinkgd.lab.train.identity import TOKENIZER, changed_sizes, model_content, recorded_sizes
from sinkgd.lab.train.world import World


@dataclass(frozen=True)
class StartingWeights:
    """Trained weights in a folder, with the sizes and the tokenizer of their model."""

    folder: Path
    sizes: ModelSizes
    sha256: str  # hex; of config.json and tensors, or of the checksums of a run's checkpoint
    tokenizer_sha256: str | None  # None for a run that did not record it
    tokenizer: str  # path of the tokenizer, or the text on which it was trained
    make_shards: str  # the commands that prepare another text with this tokenizer
    checkpoint: Path | None = None  # of the last step of a run; None for a Hugging Face checkpoint
    notes: tuple[str, ...] = ()  # on settings in the folder that are not used

    @classmethod
    def find(cls, folder: Path, sequence_length: int) -> "StartingWeights":
        """Find the weights in a folder.

        Args:
            folder: Folder of a finished run, or of a Hugging Face checkpoint.
            sequence_length: Tokens of the sequences to train on.

        Raises:
            ConfigError: If the folder holds neither a finished run nor a Hugging Face checkpoint;
                if the run trained adapters, or its last checkpoint is missing or damaged; if the
                Hugging Face checkpoint has no tokenizer.json; or if the model takes only shorter
                sequences.
            ModelError: If the laboratory does not have the model of a Hugging Face checkpoint, or
                a file of the checkpoint is missing or damaged.
            CheckpointError: If all checkpoints of the run are damaged.
        """
        sizes = sizes_in(folder, sequence_length)
        if _is_huggingface(folder):
            return cls._huggingface(folder, sizes)
        start = _finished_run(folder).start
        checkpoints = RunFolder(folder).checkpoints
        found = latest_valid(checkpoints)
        if found is None or found.damages:
            why = "; ".join(found.damages) if found else f"there is none in {checkpoints}"
            raise ConfigError(
                f"model.weights is {str(folder)!r}, which lacks the checkpoint of its last step: "
                f"{why}"
            )
        tokenizer, make_shards = _tokenizer_of(start.config["data"])
        return cls(
            folder,
            sizes,
            sha256=hashlib.sha256((found.path / CHECKSUMS).read_bytes()).hexdigest(),
            tokenizer_sha256=start.inputs.get(TOKENIZER),
            tokenizer=tokenizer,
            make_shards=make_shards,
            checkpoint=found.path,
        )

    @classmethod
    def _huggingface(cls, folder: Path, sizes: ModelSizes) -> "StartingWeights":
        tokenizer = folder / TOKENIZER_FILE
        if not tokenizer.is_file():
            raise ConfigError(
                f"model.weights is {str(folder)!r}, which holds no tokenizer.json to compare with "
                "that of the text. Write one with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        dropout = ", ".join(
            f"{name} {value}" for name, value in read_config(folder).dropout.items()
        )
        note = f"note: the model is trained without dropout; {folder / CONFIG_FILE} has {dropout}"
        return cls(
            folder,
            sizes,
            sha256=content_sha256(folder),
            tokenizer_sha256=Tokenizer.from_file(tokenizer).sha256,
            tokenizer=str(tokenizer),
            make_shards=_prepare_with(tokenizer),
            notes=(note,) if dropout else (),
        )

    def check(self, model: ModelSizes, text: Manifest) -> None:
        """Check that the weights fit a model and a text.

        Raises:
            ConfigError: If the model has other sizes, or the text has another tokenizer, or ids
                without a row in the embedding.
        """
        begin = f"model.weights is {str(self.folder)!r}, "
        if changed := changed_sizes(model_content(self.sizes), model_content(model)):
            raise ConfigError(
                f"{begin}whose model has other sizes: {changed}. Leave out model.preset and "
                "model.vocab_size, so that the sizes are read from that folder, and give the "
                "training.sequence_length of that model"
            )
        if self.tokenizer_sha256 != text.tokenizer_sha256:
            raise ConfigError(
                f"{begin}which was trained with the tokenizer {self.tokenizer} (hash "
                f"{self.tokenizer_sha256}), but the text has another one (hash "
                f"{text.tokenizer_sha256}). Prepare the text with that tokenizer: "
                f"{self.make_shards}"
            )
        if self.sizes.vocab_size < text.rows_needed:
            raise ConfigError(
                f"{begin}whose embedding has {self.sizes.vocab_size} rows, but the text has ids up "
                f"to {text.rows_needed - 1}; use a text without these tokens"
            )

    def load(self, model: LanguageModel, world: World) -> None:
        """Load the weights into a model, with or without adapters; a collective call."""
        if self.checkpoint is None:
            load_tensors(self.folder, model)
        else:
            load_weights(self.checkpoint, model, world)


def _tokenizer_of(data: Mapping[str, Any]) -> tuple[str, str]:
    """Name a run's tokenizer, and give the commands that prepare another text with it.

    Args:
        data: The table ``data`` of the run's configuration.
    """
    corpus = str(data["corpus"])
    is_there = corpus == EMBEDDED or "*" in corpus or expanded(corpus).exists()
    if shards_at(corpus) is not None or not is_there:
        path = Path(corpus) / TOKENIZER_FILE
        return str(path), _prepare_with(path)
    size = f" --vocab-size {data['vocab_size']}" if data.get("vocab_size") else ""
    first = f"sinkgd prepare {shlex.quote(corpus)} --out FIRST{size}"
    return f"of {corpus}", f"{first}, then {_prepare_with(Path('FIRST') / TOKENIZER_FILE)}"


def _prepare_with(tokenizer: Path) -> str:
    return f"sinkgd prepare TEXT --tokenizer {shlex.quote(str(tokenizer))} --out SHARDS"


def sizes_in(folder: Path, sequence_length: int) -> ModelSizes:
    """Return the sizes of the model in a folder; its weights are not read and may be absent.

    Args:
        folder: Folder of a finished run, or of a Hugging Face checkpoint.
        sequence_length: Tokens of the sequences to train on.

    Raises:
        ConfigError: If the folder holds neither a finished run nor a Hugging Face checkpoint, the
            run trained adapters, or the model takes only shorter sequences.
        ModelError: If the laboratory does not have the model of a Hugging Face checkpoint, or its
            config.json is damaged.
    """
    huggingface = _is_huggingface(folder)
    sizes: ModelSizes
    if huggingface:
        sizes = read_config(folder).sizes
    else:
        sizes = recorded_sizes(_finished_run(folder).start)
    if sequence_length > sizes.max_sequence_length:
        raise ConfigError(
            f"training.sequence_length is {sequence_length}, but the model in model.weights "
            f"{str(folder)!r} takes at most {sizes.max_sequence_length} tokens; give no more"
        )
    if huggingface and isinstance(sizes, LlamaConfig):  # rotary positions have no weights
        sizes = replace(sizes, max_sequence_length=sequence_length)
    return sizes


def _is_huggingface(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and not RunFolder(folder).results.exists()


def _finished_run(folder: Path) -> Run:
    """Read the run in a folder.

    Raises:
        ConfigError: If the folder holds no finished run, or one that trained adapters.
    """
    run_folder = RunFolder(folder)
    begin = f"model.weights is {str(folder)!r}, which"
    try:
        run = Run.read(run_folder.results)
    except ResultsError as error:
        raise ConfigError(
            f"{begin} holds no run ({error}) and no {CONFIG_FILE}; give the folder of "
            "`sinkgd train --out`, or of a Hugging Face checkpoint"
        ) from error
    if not run.finished:
        raise ConfigError(
            f"{begin} holds a run that has not finished. Go on with it first: "
            f"sinkgd train --config {run_folder.config} --out {folder}"
        )
    model = run.start.config.get("model", {})
    if rank := model.get("lora_rank"):
        raise ConfigError(
            f"{begin} holds a run that trained adapters (model.lora_rank {rank}). A run cannot "
            "begin with them, since they are not merged into the weights. Give the folder with "
            f"which that run began, {str(model.get('weights'))!r}, or that of a run without "
            "adapters"
        )
    return run
