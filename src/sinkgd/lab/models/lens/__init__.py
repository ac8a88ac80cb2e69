"""Lens: GPT-2 with mixed attention logits, factored keys and values, and a route between parts."""

from sinkgd.lab.models.lens.model import Lens as Lens
from sinkgd.lab.models.lens.model import LensConfig as LensConfig
from sinkgd.lab.models.lens.model import lens_from_gpt2 as lens_from_gpt2
