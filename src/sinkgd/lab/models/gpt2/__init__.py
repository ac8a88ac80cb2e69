"""GPT-2, with Hugging Face's weight names and layouts."""

from sinkgd.lab.models.gpt2.model import GPT2 as GPT2
from sinkgd.lab.models.gpt2.model import GPT2Config as GPT2Config
