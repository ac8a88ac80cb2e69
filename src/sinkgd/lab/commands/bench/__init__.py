"""`sinkgd bench`: measurements, one file each; the options of a measurement are its dataclass."""

# Each measurement's module is imported only when it is made.
COMMANDS = {
    "step": ("Step", "one optimizer step on real matrices, against AdamW and the memory's floor"),
    "memory": (
        "Memory",
        "what optimizers keep and allocate, and the peaks of whole training steps",
    ),
    "gpu": ("Gpu", "what a step would do on a GPU, counted without one, against targets"),
    "kernels": ("Kernels", "every backend over shapes and types, in bytes a second"),
    "loop": ("Loop", "the training loop against a bare one, in tokens a second"),
}

USAGE = """\
usage: sinkgd bench MEASUREMENT [OPTIONS]

Measure speed and memory. Leave the machine idle meanwhile.

measurements:
{commands}

options:
  -h, --help       show this help; `sinkgd bench MEASUREMENT --help` shows a measurement's options

examples:
  sinkgd bench step --out bench                             the targets, tables and a page
  sinkgd bench step --workloads llama-60m --dtypes float32  one of them
  sinkgd bench memory --workloads none --out bench          peaks of training, release × optimizer
  sinkgd bench gpu                                          counts for a GPU, and their targets
  sinkgd bench loop --optimizers sinkgd,swan --rounds 11    what the training loop costs
"""
