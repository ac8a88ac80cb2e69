"""Recipes: optimizers with their common settings, and how they share a model with AdamW."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import sinkgd
from sinkgd.lab.models.lora import base_name
from sinkgd.lab.train.config import ConfigError
from sinkgd.optim.overrides import Overrides

Options = Mapping[str, Any]  # resolved values of the recipe's options, by name
Groups = list[dict[str, Any]]

PYTORCH_OPTIMIZER = "pytorch_optimizer"


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its common settings."""

    name: str
    summary: str  # one line
    source: str  # the source of the defaults
    defaults: Options  # fields of `OptimizerConfig` that the recipe takes, with default values
    build: Callable[[nn.Module, Options], Optimizer]
    can_shard: bool = False  # whether weights may be sharded over ranks
    can_release: bool = False  # whether it can apply one gradient at a time, inside backward
    package: str | None = None  # a package that it needs besides torch, from extra `experiments`


def family_groups(
    model: nn.Module, o: Options, algorithm: str, overrides: Overrides | None = None
) -> Groups:
    """Return groups: hidden matrices run ``algorithm``, the other parameters run AdamW.

    ``overrides`` may give some parameters another algorithm, as in `sinkgd.param_groups`.

    Raises:
        ConfigError: If only LoRA adapters are trained.
    """
    check_trains_matrices(model)
    matrix_lr = o["lr"] if o.get("matrix_lr") is None else o["matrix_lr"]
    return sinkgd.param_groups(
        model,
        lr=o["lr"],
        matrix_lr_scale=matrix_lr / o["lr"],
        matrix_algorithm=algorithm,
        deflated_rank=int(o.get("deflated_rank", 0)),
        weight_decay=o.get("weight_decay", 0.0),
        betas=betas(o),
        overrides=overrides,
        base_width=o.get("base_width"),
    )


def split_by_role(model: nn.Module, o: Options) -> tuple[Groups, Groups]:
    """Return groups of hidden matrices, and groups of all other parameters, as torch takes them.

    Hidden matrices are those inside the blocks, except LoRA adapters. The other parameters are
    adapters, embeddings, output head, norms and biases.
    """
    matrices: Groups = []
    rest: Groups = []
    for group in family_groups(model, o, "sinkgd"):
        plain = {key: group[key] for key in ("params", "lr", "weight_decay")}
        (rest if group["algorithm"] == "adamw" else matrices).append(plain)
    return matrices, rest


def at_one_or_two_rates(model: nn.Module, o: Options) -> Groups:
    """Return groups for an optimizer that updates all parameters alike.

    With a ``matrix_lr`` these are all groups of `split_by_role`, otherwise one group.
    """
    if o["matrix_lr"] is None:
        return [{"params": trained(model), "lr": o["lr"], "weight_decay": o["weight_decay"]}]
    matrices, rest = split_by_role(model, o)
    return [*matrices, *rest]


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are trained, with their names; frozen ones get no gradient."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def check_trains_matrices(model: nn.Module) -> None:
    """Refuse a model of which only LoRA adapters are trained, since they would all get AdamW.

    Raises:
        ConfigError: If it is such a model; the message names recipes that train adapters.
    """
    if all(base_name(name) is None for name, _ in trained(model)):
        raise ConfigError(
            "optimizer.recipe has a method for hidden matrices, but with model.lora_rank only "
            "adapters are trained; give optimizer.recipe sinkgd-finetune, or a recipe with one "
            "method for all parameters, such as adamw-one-lr"
        )


def betas(o: Options) -> tuple[float, float]:
    """Return both of Adam's betas, with torch's defaults if the recipe takes none."""
    return o.get("beta1", 0.9), o.get("beta2", 0.999)


def check_matrices(groups: Groups, method: str) -> None:
    """Refuse parameters that are not matrices.

    Raises:
        ValueError: If a parameter is not a matrix. The message begins with ``method`` and names
            the first such parameter.
    """
    for group in groups:
        for i, param in enumerate(group["params"]):
            if param.ndim != 2:
                name = group["param_names"][i] if "param_names" in group else f"parameter {i}"
                raise ValueError(
                    f"{method}; {name!r} has shape {tuple(param.shape)}. Give it to AdamW"
                )
