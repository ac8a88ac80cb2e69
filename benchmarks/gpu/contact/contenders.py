"""Optimizers that a step is measured with, and the matrices that they step on."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

import sinkgd
from contact.items import Setting, Skipped
from contact.peer import compiled_step, naive_step, peer_step
from sinkgd.kernels import backends
from sinkgd.kernels.triton import TritonBackend
from sinkgd.lab.models import LLAMAS

LR = 1e-3
Step = Callable[[], object]


class Workload(NamedTuple):
    """Matrices of a model's blocks."""

    name: str
    preset: str
    layers: int | None = None  # of the model; None for all


TINY = Workload("llama-nano-64 layer", "llama-nano-64", 1)
M60, M130, M350 = (Workload(name, name) for name in ("llama-60m", "llama-130m", "llama-350m"))
LAYER = Workload("llama-1b layer", "llama-1b", 1)
B1, B7 = Workload("llama-1b", "llama-1b"), Workload("llama-7b", "llama-7b")


def shapes(workload: Workload) -> list[tuple[int, int]]:
    """Return the shapes of a workload's matrices."""
    c = LLAMAS[workload.preset]
    h, inner = c.hidden_size, c.intermediate_size
    layers = c.num_layers if workload.layers is None else workload.layers
    return ([(h, h)] * 4 + [(inner, h)] * 2 + [(h, inner)]) * layers


def matrices(workload: Workload, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Return random matrices with random gradients."""
    generator = torch.Generator(device=device).manual_seed(0)
    params = []
    for shape in shapes(workload):
        param, grad = (
            torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            for _ in range(2)
        )
        params.append(nn.Parameter(param))
        params[-1].grad = grad
    return params


class Contender(NamedTuple):
    """A way to update all matrices once."""

    name: str
    build: Callable[[list[nn.Parameter], Setting], Step]
    passes: float | None = None  # over matrices that do not fit a cache; None if unknown
    captures: bool = True  # whether its step may go into a CUDA graph


def _ours(*, iterations: int = 5, rank: int = 0, backend: str = "auto") -> Callable[..., Step]:
    def build(params: list[nn.Parameter], setting: Setting) -> Step:
        del setting
        group = {"params": params, "algorithm": "sinkgd"}
        return sinkgd.SinkGD(
            [group],
            lr=LR,
            sinkhorn_iterations=iterations,
            deflated_rank=rank,
            backend=backend,
        ).step

    return build


def _former(way: str, *, rank: int = 0) -> Callable[..., Step]:
    """Return a function that builds our step with one fast path of the backend turned off."""

    def build(params: list[nn.Parameter], setting: Setting) -> Step:
        backend = next(one for one in backends() if isinstance(one, TritonBackend))
        step = _ours(rank=rank)(params, setting)

        def former() -> None:
            with patch.object(backend, way, False):
                step()

        return former

    return build


def _adamw(params: list[nn.Parameter], setting: Setting) -> Step:
    return torch.optim.AdamW(params, lr=LR, fused=True, capturable=setting.on_gpu).step


def _sgd(params: list[nn.Parameter], setting: Setting) -> Step:
    del setting
    return torch.optim.SGD(params, lr=LR, fused=True).step


def _muon(params: list[nn.Parameter], setting: Setting) -> Step:
    del setting
    return torch.optim.Muon(params, lr=LR, adjust_lr_fn="match_rms_adamw").step


def _peer(params: list[nn.Parameter], setting: Setting) -> Step:
    if not setting.on_gpu:
        raise Skipped("needs a GPU")
    if importlib.util.find_spec("triton") is None:
        raise Skipped("needs triton")
    return lambda: peer_step(params, LR, 5)


def _loop(
    step: Callable[[Sequence[Tensor], float, int], None],
) -> Callable[[list[nn.Parameter], Setting], Step]:
    return lambda params, setting: lambda: step(params, LR, 5)  # noqa: ARG005 - the contract


ADAMW = Contender("adamw", _adamw, 7)
SGD = Contender("sgd", _sgd, 3)
PLAIN = Contender("sinkgd", _ours(), 8)
HALVES = Contender("sinkgd halves", _former("whole_rows"), 13)
PLAIN_1 = Contender("sinkgd L=1", _ours(iterations=1), 4)
DEFLATED = Contender("deflated", _ours(rank=15), 12)
DEFLATED_COPIES = Contender("deflated copies", _former("products_by_dot", rank=15))
EAGER = Contender("sinkgd eager", _ours(backend="eager"))
DEFLATED_EAGER = Contender("deflated eager", _ours(rank=15, backend="eager"))
MUON = Contender("muon", _muon)
PEER = Contender("peer triton", _peer, 33)  # each half step reads twice and writes once
COMPILED = Contender("compiled loop", _loop(compiled_step), captures=False)
NAIVE = Contender("naive loop", _loop(naive_step), 40)

USUAL = (ADAMW, PLAIN, HALVES, DEFLATED, PLAIN_1, SGD, PEER, MUON)
ALL = (*USUAL, DEFLATED_COPIES, COMPILED, NAIVE, EAGER, DEFLATED_EAGER)
CONTENDERS = {contender.name: contender for contender in ALL}
