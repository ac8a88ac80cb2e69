"""Training: from a configuration to a folder with results and checkpoints."""

from sinkgd.lab.train.checkpoint_validation import CheckpointError as CheckpointError
from sinkgd.lab.train.config import ConfigError as ConfigError
from sinkgd.lab.train.config import RunConfig as RunConfig
from sinkgd.lab.train.folder import RunFolder as RunFolder
from sinkgd.lab.train.folder import RunFolderError as RunFolderError
from sinkgd.lab.train.heartbeat import LostRankError as LostRankError
from sinkgd.lab.train.recipes import RECIPES as RECIPES
from sinkgd.lab.train.resolve import resolve as resolve
from sinkgd.lab.train.run import Outcome as Outcome
from sinkgd.lab.train.run import train as train
from sinkgd.lab.train.training_step import NonFiniteLossError as NonFiniteLossError
