"""Models: plain torch modules with Hugging Face's weight names, and their presets."""

from sinkgd.lab.models.llama import Llama as Llama
from sinkgd.lab.models.llama import LlamaConfig as LlamaConfig
from sinkgd.lab.models.llama import ModelError as ModelError
from sinkgd.lab.models.presets import PRESETS as PRESETS
from sinkgd.lab.models.presets import build_model as build_model
from sinkgd.lab.models.presets import preset_config as preset_config
