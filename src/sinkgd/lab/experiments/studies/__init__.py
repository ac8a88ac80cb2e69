"""The studies, one file each, and the table of all of them."""

from collections.abc import Mapping
from types import MappingProxyType

from sinkgd.lab.experiments.studies.ablation import ABLATION
from sinkgd.lab.experiments.studies.alpha import ALPHA
from sinkgd.lab.experiments.studies.batch import BATCH
from sinkgd.lab.experiments.studies.beta1 import BETA1S
from sinkgd.lab.experiments.studies.finetune import FINETUNE
from sinkgd.lab.experiments.studies.iterations import ITERATIONS
from sinkgd.lab.experiments.studies.ladder import LADDER
from sinkgd.lab.experiments.studies.lens import LENS
from sinkgd.lab.experiments.studies.momentum import MOMENTUM
from sinkgd.lab.experiments.studies.pareto import PARETO
from sinkgd.lab.experiments.studies.rank import RANKS
from sinkgd.lab.experiments.studies.recipes import RECIPES
from sinkgd.lab.experiments.studies.scale import NAME, QUESTION
from sinkgd.lab.experiments.studies.shift import SHIFT
from sinkgd.lab.experiments.studies.spectral import SPECTRAL
from sinkgd.lab.experiments.studies.table1 import TABLE1
from sinkgd.lab.experiments.studies.tables import TABLES
from sinkgd.lab.experiments.studies.width import WIDTH
from sinkgd.lab.experiments.study import Study
from sinkgd.lab.options import suggest
from sinkgd.lab.train.config import ConfigError

_TABLE = (
    TABLE1,
    LENS,
    ITERATIONS,
    ALPHA,
    ABLATION,
    BATCH,
    TABLES,
    MOMENTUM,
    WIDTH,
    SPECTRAL,
    SHIFT,
    PARETO,
    FINETUNE,
    LADDER,
    RECIPES,
    RANKS,
    BETA1S,
)

STUDIES: Mapping[str, Study] = MappingProxyType({study.name: study for study in _TABLE})

# The questions of all studies, including `scale`, which has no runs.
QUESTIONS: Mapping[str, str] = MappingProxyType(
    {**{study.name: study.question for study in _TABLE}, NAME: QUESTION}
)


def find_study(name: str) -> Study:
    """Return the study called ``name``.

    Raises:
        ConfigError: If there is none; the message suggests the nearest name.
    """
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}; {suggest(name, QUESTIONS)}")
    return STUDIES[name]
