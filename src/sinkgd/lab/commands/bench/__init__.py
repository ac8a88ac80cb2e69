"""`sinkgd bench`: measurements. Each has a file with a dataclass of its options."""

# For each measurement, its class and a summary. Its module is imported only when it runs.
COMMANDS = {
    "step": ("Step", "one optimizer step, compared with AdamW and with the bandwidth of memory"),
    "memory": (
        "Memory",
        "what optimizers keep and allocate, and the peaks of whole training steps",
    ),
    "gpu": ("Gpu", "what a step would do on a GPU, counted without a GPU, and target values"),
    "kernels": ("Kernels", "every backend over shapes and types, in bytes per second"),
    "loop": ("Loop", "the training loop compared with a bare loop, in tokens per second"),
}

USAGE = """\
usage: sinkgd bench MEASUREMENT [OPTIONS]

Measure speed and memory. Run nothing else on the machine meanwhile.

measurements:
{commands}

options:
  -h, --help       show this help; `sinkgd bench MEASUREMENT --help` shows a measurement's options

examples:
  sinkgd bench step --out bench                             the targets, tables and a page
  sinkgd bench step --workloads llama-60m --dtypes float32  one workload, one type
  sinkgd bench memory --workloads none --out bench          peak memory of training, per optimizer
  sinkgd bench gpu                                          counts for a GPU, and their targets
  sinkgd bench loop --optimizers sinkgd,swan --rounds 11    what the training loop costs
"""
