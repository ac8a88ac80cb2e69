"""The weights that a run begins with, taken from another run: fine-tuning."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sinkgd.lab.data import Manifest
from sinkgd.lab.models import Sizes
from sinkgd.lab.results import ResultsError, Run, RunStart
from sinkgd.lab.train.checkpoint import load_weights
from sinkgd.lab.train.checkpoint_validation import CHECKSUMS, latest_valid
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.folder import RunFolder
from sinkgd.lab.train.identity import MODEL, TOKENIZER, changed_sizes, model_content
from sinkgd.lab.train.world import World


@dataclass(frozen=True)
class StartingWeights:
    """The last checkpoint of a finished run."""

    folder: Path  # of the run
    checkpoint: Path
    start: RunStart  # the run's first record

    @classmethod
    def find(cls, folder: Path) -> "StartingWeights":
        """Find the weights of a run.

        Raises:
            ConfigError: If the folder holds no finished run.
            CheckpointError: If all its checkpoints are damaged.
        """
        run_folder = RunFolder(folder)
        begin = f"model.weights is {str(folder)!r}, which"
        try:
            run = Run.read(run_folder.results)
        except ResultsError as error:
            raise ConfigError(
                f"{begin} holds no run ({error}); give the folder of `sinkgd train --out`"
            ) from error
        if not run.finished:
            raise ConfigError(
                f"{begin} holds a run that has not finished. Go on with it first: "
                f"sinkgd train --config {run_folder.config} --out {folder}"
            )
        found = latest_valid(run_folder.checkpoints)
        if found is None or found.damages:
            why = (
                "; ".join(found.damages) if found else f"there is none in {run_folder.checkpoints}"
            )
            raise ConfigError(f"{begin} lacks the checkpoint of its last step: {why}")
        return cls(folder, found.path, run.start)

    @property
    def sha256(self) -> str:
        """Hash of the checksums of the checkpoint's files, hex."""
        return hashlib.sha256((self.checkpoint / CHECKSUMS).read_bytes()).hexdigest()

    def check(self, model: Sizes, text: Manifest) -> None:
        """Check that the weights fit a model and a text.

        Raises:
            ConfigError: If the model has other sizes, or the text another tokenizer.
        """
        if changed := changed_sizes(self.start.inputs.get(MODEL) or {}, model_content(model)):
            raise ConfigError(
                f"model.weights is {str(self.folder)!r}, whose model has other sizes: {changed}. "
                "Give its model.preset, training.sequence_length and vocabulary"
            )
        tokenizer = self.start.inputs.get(TOKENIZER)
        if tokenizer != text.tokenizer_sha256:
            corpus = self.start.config["data"]["corpus"]
            raise ConfigError(
                f"model.weights is {str(self.folder)!r}, which was trained with the tokenizer of "
                f"{corpus} (hash {tokenizer}), but the text has another one (hash "
                f"{text.tokenizer_sha256}). Prepare the text with that tokenizer: "
                "sinkgd prepare TEXT --tokenizer FOLDER/tokenizer.json --out SHARDS"
            )

    def load(self, model: nn.Module, world: World) -> None:
        """Load the weights into a model, with or without adapters; a collective call."""
        load_weights(self.checkpoint, model, world)
