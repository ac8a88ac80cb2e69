"""Steps of every method with every option, and every public function: their bits, by name.

As a program, ``every_step.py KIND [DEFAULT]`` prints them as JSON, after it has set a process-wide
default dtype or device. KIND is ``library``, ``lab``, ``counts``, ``triton`` or ``compiled``.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sinkgd
from norm_cases import NORMS
from optim.test_option_pairs import OPTIONS
from optimizer_cases import OPTIMIZERS
from sinkgd.deflation import deflate
from sinkgd.newton_schulz import orthogonalize

SHAPES = [(24, 16), (16, 40), (3, 10, 8)]
STEPS = 3
BACKENDS = ["auto", "eager", "cpu"]
MORE_OPTIONS = {
    "plain": {},
    "deflated by 8": {"deflated_rank": 8},
    "at random": {"rounding": "stochastic"},
    "cautious": {"weight_decay": 0.1, "cautious_decay": True},
    "deflated at random": {"rounding": "stochastic", "deflated_rank": 2},
}
COUNTED = ["SinkGD-adamw", "SinkGD-sage", "SPAM", "AdamWSPAM"]

Walk = Callable[[], list[Tensor]]


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def walk(
    build: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    *,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    spoiled: bool = False,
    change_step: Callable[[Callable[[], None]], Callable[[], None]] = lambda step: step,
) -> list[Tensor]:
    """Take steps, saving and loading the state on the way; return the parameters and the state."""
    params = [nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]
    optimizer = build(params, **options)
    step = change_step(optimizer.step)
    for number in range(steps):
        if "cross_fit" in options:
            for i, param in enumerate(params):
                param.grad = normal(param.shape, 1000 + 10 * number + i, dtype).pow_(3)
            optimizer.hold_out()
        for i, param in enumerate(params):
            param.grad = normal(param.shape, 10 * number + i, dtype).pow_(3)
        if spoiled:
            params[0].grad.view(-1)[0] = torch.nan
        step()
        if number == 0:
            optimizer.load_state_dict(optimizer.state_dict())
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*params, *(value for value in states if isinstance(value, Tensor))]


def _group(params: list[nn.Parameter], *, backend: str, **options: Any) -> sinkgd.SinkGD:
    group = {"params": params, "algorithm": "sinkgd", "backend": backend, **options}
    return sinkgd.SinkGD([group], lr=1e-2)


def methods() -> Iterator[tuple[str, Walk]]:
    """Every method, with each of its options."""
    for case in OPTIMIZERS:
        shapes = [*SHAPES, (7,)] if case.takes_vectors else SHAPES
        for options in case.options:
            yield f"{case} {options}", partial(walk, case.build, options, shapes=shapes)


def options_by_backend(backends: list[str]) -> Iterator[tuple[str, Walk]]:
    """SinkGD with each option on each backend, in float32 and in bfloat16."""
    for backend in backends:
        build = partial(_group, backend=backend)
        for name, options in (MORE_OPTIONS | OPTIONS).items():
            for dtype in (torch.float32, torch.bfloat16):
                own = partial(walk, build, options, shapes=SHAPES, dtype=dtype)
                yield f"{backend} {name} {dtype}", own
        skipping = {"nonfinite": "skip", "weight_decay": 0.1}
        own = partial(walk, build, skipping, shapes=SHAPES, spoiled=True)
        yield f"{backend} one gradient has NaN", own


def functions() -> Iterator[tuple[str, Walk]]:
    """Every public function of a matrix, and those that the methods are made of."""
    for dtype in (torch.float32, torch.bfloat16):
        x = normal((40, 24), 1, dtype)
        for backend in BACKENDS:
            scales = partial(sinkgd.sinkhorn_scales, x, backend=backend)
            yield f"sinkhorn_scales {backend} {dtype}", lambda scales=scales: list(scales())
            update = partial(sinkgd.sr_sinkhorn, x, backend=backend)
            yield f"sr_sinkhorn {backend} {dtype}", lambda update=update: [update()]
        yield f"temper {dtype}", lambda x=x: [sinkgd.temper(x)]
        for norms in ([norm] for norm in NORMS.values()):
            made = partial(sinkgd.multi_normalize, x, norms, num_iters=2)
            yield f"multi_normalize {norms} {dtype}", lambda made=made: [made()]
            found = partial(sinkgd.residuals, x, norms)
            yield f"residuals {norms} {dtype}", lambda found=found: list(found())
    for norm in NORMS.values():
        yield f"project {norm}", lambda norm=norm: [norm.project(normal((40, 24), 1))]
    for shape in ((40, 24), (96, 24), (3, 24, 40)):
        yield f"orthogonalize {shape}", lambda shape=shape: [orthogonalize(normal(shape, 1))]
        yield f"deflate {shape}", lambda shape=shape: [deflate(normal(shape, 1), 2)]


def library() -> Iterator[tuple[str, Walk]]:
    """All that the library does with one process."""
    yield from methods()
    yield from options_by_backend(BACKENDS)
    yield from functions()


def counts() -> Iterator[tuple[str, Walk]]:
    """Methods that count their steps, beyond what half precision can count."""
    for case in OPTIMIZERS:
        if case.name in COUNTED:
            yield case.name, partial(walk, case.build, {}, shapes=[(3, 2)], steps=300)


def compiled() -> Iterator[tuple[str, Walk]]:
    """Steps whose graph torch.compile captures."""
    capture = partial(torch.compile, backend="aot_eager")
    for name, options in (("plain", {}), ("deflated", {"deflated_rank": 2})):
        build = partial(_group, backend="auto")
        yield name, partial(walk, build, options, shapes=SHAPES, change_step=capture)


def triton() -> Iterator[tuple[str, Walk]]:
    """The kernels of triton, in its interpreter."""
    for name, options in MORE_OPTIONS.items():
        build = partial(_group, backend="triton", sinkhorn_iterations=1)
        for dtype in (torch.float32, torch.bfloat16):
            own = partial(walk, build, options, shapes=[(24, 16)], dtype=dtype, steps=1)
            yield f"{name} {dtype}", own


def lab() -> Iterator[tuple[str, Walk]]:
    """Every recipe of the laboratory on a model of each family."""
    from lab.train.recipes.tiny import CONFIG, TOKENS, built, soon, train  # noqa: F401
    from sinkgd.lab.models import build_model
    from sinkgd.lab.train.recipes import RECIPES

    sizes = {"vocab_size": CONFIG.vocab_size, "max_sequence_length": 16}

    def trained(preset: str, recipe: str) -> list[Tensor]:
        with torch.device("cpu"):  # a user may build a model where they like
            model = build_model(preset, **sizes)
        losses = train(model, built(model, recipe, **soon(recipe)), 2)
        return [*model.parameters(), torch.tensor(losses, dtype=torch.float64, device="cpu")]

    for recipe in RECIPES:
        yield recipe, partial(trained, "llama-nano", recipe)
    for preset in ("gpt2-nano", "lens-nano"):
        yield preset, partial(trained, preset, "sinkgd")


KINDS = {each.__name__: each for each in (library, lab, counts, compiled, triton)}


def digest(tensors: list[Tensor]) -> str:
    """The bits of tensors, their types and their shapes, in a few letters."""
    seen = hashlib.sha256()
    for x in tensors:
        seen.update(f"{x.dtype} {tuple(x.shape)} {x.device}".encode())
        flat = x.detach().contiguous().flatten()
        seen.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return seen.hexdigest()[:16]


def bits_of(walks: Iterable[tuple[str, Walk]]) -> dict[str, str]:
    """The bits of every walk by its name, or the error that ended it."""
    found = {}
    for name, own in walks:
        try:
            found[name] = digest(own())
        except Exception as error:  # noqa: BLE001 - it is a result, which differs
            found[name] = f"{type(error).__name__}: {error}"
    return found


def set_default(default: str) -> None:
    """Set the default dtype, or else the default device, that is called ``default``."""
    dtype = getattr(torch, default, None)
    if isinstance(dtype, torch.dtype):
        torch.set_default_dtype(dtype)
    else:
        torch.set_default_device(default)


if __name__ == "__main__":
    walks = list(KINDS[sys.argv[1]]())  # imports what it needs before the default is set
    if len(sys.argv) > 2:
        set_default(sys.argv[2])
    sys.stdout.write(json.dumps(bits_of(walks)))
