"""Autocast and a reduced matmul precision change no bit of an update, and stay as they were."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from every_step import (
    BACKENDS,
    Walk,
    bits_of,
    compiled,
    functions,
    methods,
    normal,
    options_by_backend,
    walk,
)
from optimizer_cases import OPTIMIZERS
from sinkgd import precision
from sinkgd.deflation import deflate
from sinkgd.newton_schulz import orthogonalize
from sinkgd.precision import in_full_precision

SETTINGS = ["autocast", "medium", "both"]


@contextmanager
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def lowered(setting: str) -> Iterator[None]:
    with ExitStack() as stack:
        if setting != "medium":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if setting != "autocast":
            stack.enter_context(medium())
        yield


def precisions() -> tuple[str, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@cache
def bits_outside(kind: str) -> dict[str, str]:
    return bits_of(KINDS[kind]())


def large() -> Iterator[tuple[str, Walk]]:
    """Matrices of a size at which torch takes products in bfloat16 where it may."""
    shapes = [(256, 320), (3, 320, 256)]
    for case in OPTIMIZERS:
        for options in case.options[:1]:
            yield f"{case} {options}", partial(walk, case.build, options, shapes=shapes, steps=1)
    for shape in shapes:
        x = normal(shape, 1)
        for function in (orthogonalize, partial(deflate, rank=8), sinkgd.sr_sinkhorn):
            own = partial(function, x)
            yield f"{function} {shape}", lambda own=own: [own()]


KINDS = {
    "methods": methods,
    "options": partial(options_by_backend, BACKENDS),
    "functions": functions,
    "compiled": compiled,
    "large": large,
}


class Watch(TorchDispatchMode):
    """Note the matmul precision of every product of float32 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in {"mm", "bmm", "addmm", "baddbmm", "baddbmm_", "mv"}:
            self.seen.add(new_precisions())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_products_on_this_machine(setting):
    """Otherwise the other tests could not fail."""
    product = partial(torch.bmm, normal((3, 512, 512), 1), normal((3, 512, 512), 2))
    if setting == "medium" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU takes no products in bfloat16")
    with lowered(setting):
        assert not torch.equal(product().float(), in_full_precision(product)())


@pytest.mark.parametrize("kind", ["methods", "options", "functions"])
def test_every_product_is_taken_in_full_precision(kind):
    for name, own in KINDS[kind]():
        watch = Watch()
        with medium(), watch:
            own()
        assert watch.seen <= {("ieee", "ieee")}, name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["methods", "options", "functions", "large"])
def test_a_setting_changes_no_bit(kind, setting):
    expected = bits_outside(kind)
    with lowered(setting):
        found = bits_of(KINDS[kind]())
    assert {name for name in expected if found[name] != expected[name]} == set()


@pytest.mark.slow
def test_autocast_changes_no_bit_of_a_compiled_step():
    expected = bits_outside("compiled")
    with lowered("autocast"):
        assert bits_of(compiled()) == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_no_bit_of_a_released_step(setting):
    def released(setting: str | None) -> torch.Tensor:
        weight = nn.Parameter(normal((40, 24), 1))
        optimizer = sinkgd.SWAN([weight], lr=0.1)
        with sinkgd.GradientRelease(optimizer):
            loss = (weight * normal((40, 24), 2)).sum()
            with lowered(setting) if setting else ExitStack():
                loss.backward()
        return weight.detach()

    assert torch.equal(released(setting), released(None))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_closure_keeps_the_settings(setting):
    weight = nn.Parameter(normal((40, 24), 1))
    optimizer = sinkgd.SWAN([weight], lr=0.1)
    seen = []

    def closure() -> torch.Tensor:
        weight.grad = normal((40, 24), 2)
        seen.append((torch.is_autocast_enabled("cpu"), precisions()))
        return weight.grad.sum()

    with lowered(setting):
        outside = torch.is_autocast_enabled("cpu"), precisions()
        optimizer.step(closure)
        assert (torch.is_autocast_enabled("cpu"), precisions()) == outside
    assert seen == [outside]


class Failing:
    def project(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a norm failed")


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_exception_restores_the_settings(setting):
    with lowered(setting):
        outside = torch.is_autocast_enabled("cpu"), precisions()
        with pytest.raises(RuntimeError, match="a norm failed"):
            sinkgd.multi_normalize(normal((4, 3), 1), [Failing()])
        assert (torch.is_autocast_enabled("cpu"), precisions()) == outside


NEW_SETTINGS = [
    (torch.backends, "tf32"),
    (torch.backends.cuda.matmul, "tf32"),
    (torch.backends.mkldnn, "bf16"),
    (torch.backends.mkldnn.matmul, "bf16"),
]


@pytest.mark.parametrize("place", range(len(NEW_SETTINGS)))
def test_the_new_settings_are_restored_and_still_inherited(place):
    setting, value = NEW_SETTINGS[place]
    inside = []
    try:
        setting.fp32_precision = value
        before = new_precisions()
        in_full_precision(lambda: inside.append(new_precisions()))()
        assert new_precisions() == before
        assert {*inside[0]} <= {"ieee", "none"}
        setting.fp32_precision = "ieee"
        assert value not in new_precisions()
    finally:
        for own, _ in NEW_SETTINGS:
            own.fp32_precision = "none"


def new_precisions() -> tuple[str, str]:
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


def test_the_last_of_several_threads_restores_the_setting():
    first_is_in, second_has_left = threading.Event(), threading.Event()
    seen = []

    @in_full_precision
    def first() -> None:
        first_is_in.set()
        assert second_has_left.wait(60)
        seen.append(new_precisions())

    with medium():
        before = precisions()
        thread = threading.Thread(target=first)
        thread.start()
        assert first_is_in.wait(60)
        in_full_precision(lambda: seen.append(new_precisions()))()
        second_has_left.set()
        thread.join()
        assert precisions() == before
    assert seen == [("ieee", "ieee")] * 2


def test_the_setting_of_older_torch_is_restored(monkeypatch):
    monkeypatch.setattr(precision, "_SETTINGS", (precision._OldSetting(),))
    inside = []
    with medium():
        in_full_precision(lambda: inside.append(torch.get_float32_matmul_precision()))()
        assert torch.get_float32_matmul_precision() == "medium"
    assert inside == ["highest"]
