"""Language models in plain torch, and presets; LLaMA and GPT-2 use Hugging Face's weight names."""

from sinkgd.lab.models.gpt2 import GPT2 as GPT2
from sinkgd.lab.models.gpt2 import GPT2Config as GPT2Config
from sinkgd.lab.models.language_model import LanguageModel as LanguageModel
from sinkgd.lab.models.language_model import ModelError as ModelError
from sinkgd.lab.models.language_model import Sizes as Sizes
from sinkgd.lab.models.lens import Lens as Lens
from sinkgd.lab.models.lens import LensConfig as LensConfig
from sinkgd.lab.models.lens import lens_from_gpt2 as lens_from_gpt2
from sinkgd.lab.models.llama import Llama as Llama
from sinkgd.lab.models.llama import LlamaConfig as LlamaConfig
from sinkgd.lab.models.llama import RotaryScaling as RotaryScaling
from sinkgd.lab.models.lora import add_adapters as add_adapters
from sinkgd.lab.models.lora import draw_adapters as draw_adapters
from sinkgd.lab.models.presets import LLAMAS as LLAMAS
from sinkgd.lab.models.presets import PRESETS as PRESETS
from sinkgd.lab.models.presets import ModelSizes as ModelSizes
from sinkgd.lab.models.presets import build_model as build_model
from sinkgd.lab.models.presets import model_of as model_of
from sinkgd.lab.models.presets import preset_config as preset_config
