"""Inside ``torch.compile``: the operators are proper ones; a compiled step is the plain step."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import sinkgd
from reference import sinkhorn_knopp
from sinkgd.kernels.registry import scales, update_

# Said by torch of itself, on importing its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


GRADS = [normal((5, 7)), normal((3, 4, 6), dtype=torch.bfloat16), normal((9, 4)).t()]


class TestOperators:
    @pytest.mark.parametrize("tol", [None, 0.1])
    @pytest.mark.parametrize("started", [False, True])
    def test_scales_is_a_proper_operator(self, every_backend, tol, started):
        starts = [torch.ones(*g.shape[:-2], 1, g.shape[-1]) if started else None for g in GRADS]
        checks = opcheck(scales, (GRADS, 3, every_backend, tol, starts))
        assert checks == dict.fromkeys(ALL, "SUCCESS")

    @pytest.mark.parametrize("operator", [torch.ops.sinkgd.scales, torch.ops.sinkgd.update_])
    def test_no_graph_of_torch_compile_captures_an_operator(self, operator):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags

    @pytest.mark.parametrize("with_flags", [False, True])
    def test_update_is_a_proper_operator(self, every_backend, with_flags):
        params = [torch.randn_like(grad) for grad in GRADS]
        found = scales(GRADS, 3, every_backend, None, [None] * 3)
        flags = [torch.tensor(i != 1) for i in range(3)] if with_flags else []
        keys = [torch.tensor(i) for i in range(3)] if with_flags else []
        factors = torch.tensor(0.9), torch.tensor(-0.1)
        arguments = (params, GRADS, found[::2], found[1::2], *factors, every_backend, flags, keys)
        assert opcheck(update_, (*arguments, with_flags)) == dict.fromkeys(ALL, "SUCCESS")


def a_model():
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.Linear(24, 16, bias=False))
    for i, param in enumerate(model.parameters()):
        param.data = normal(param.shape, i)
    return model


def build(model, kind, lr, **options):
    if kind == "sinkgd-stateless":
        return sinkgd.SinkGDVariant(model.named_parameters(), lr=lr, **options)
    if kind == "swan":
        groups = sinkgd.param_groups(model, lr=lr, matrix_algorithm="swan")
        return sinkgd.SWAN(groups, **options)
    return sinkgd.SinkGDVariant(sinkgd.param_groups(model, lr=lr), **options)


def walk(kind, compiler=None, lrs=(0.1, 0.05, 0.02), tensor_lr=True, **options):
    """Take a step at each rate; return the weights."""
    model = a_model()
    first = torch.tensor(lrs[0]) if tensor_lr else lrs[0]
    optimizer = build(model, kind, first, **options)
    step = optimizer.step if compiler is None else torch.compile(optimizer.step, backend=compiler)
    for i, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            if tensor_lr:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for k, param in enumerate(model.parameters()):
            param.grad = normal(param.shape, 100 * i + k)
        step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize(
    "kind",
    ["sinkgd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sinkgd-stateless", "swan"))],
)
def test_a_compiled_step_is_the_plain_step(kind):
    # Deflation lets float32 products round in another order, and scales the difference.
    rtol, atol = (1e-5, 1e-6) if kind == "sinkgd" else (1e-6, 1e-7)
    for one, other in zip(walk(kind, "aot_eager"), walk(kind), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {"nonfinite": "skip"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"tol": 0.1},
                {"warm_start": True},
                {"backend": "eager"},
                {"momentum": 0.9, "nesterov": True, "tiny_rows": "mask", "operator_norm": "muon"},
                {"weight_projection": True, "constant_norm": True},
                {"momentum_rank": 2, "deflated_rank": 2, "deflated_start": "kept"},
            )
        ),
    ],
)
def test_its_options_hold_there_too(options):
    compiled = walk("sinkgd-stateless", "aot_eager", **options)
    for one, other in zip(compiled, walk("sinkgd-stateless", **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def train(kind, compiler=None, **options):
    """Take training steps, forward and backward included; return the weights."""
    model = a_model()
    optimizer = build(model, kind, torch.tensor(0.1), **options)

    def step(tokens, targets):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(tokens), targets).backward()
        optimizer.step()

    run = step if compiler is None else torch.compile(step, backend=compiler)
    for i in range(3):
        run(torch.arange(11), normal((11, 16), i))
    return [param.detach() for param in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["sinkgd", "sinkgd-stateless"])
def test_a_compiled_training_step_is_the_plain_one(kind, compiler):
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    for one, other in zip(train(kind, compiler), train(kind), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def graphs(kind, lrs, *, tensor_lr):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    walk(kind, counter, lrs=lrs, tensor_lr=tensor_lr)
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sinkgd", "sinkgd-stateless"])
def test_a_new_tensor_learning_rate_needs_no_new_graph(kind):
    steady = graphs(kind, (0.1, 0.1), tensor_lr=True)  # the first step makes AdamW's state
    assert graphs(kind, (0.1, 0.05, 0.02, 0.01), tensor_lr=True) == steady


@pytest.mark.slow
def test_a_float_learning_rate_needs_new_graphs_once():
    once = graphs("sinkgd-stateless", (0.1, 0.05), tensor_lr=False)
    assert graphs("sinkgd-stateless", (0.1, 0.05, 0.02, 0.01), tensor_lr=False) == once


def test_a_bad_gradient_reaches_no_weight_and_is_reported_by_the_next_step():
    model = a_model()
    optimizer = sinkgd.SinkGD(model.named_parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="aot_eager")
    before = [param.detach().clone() for param in model.parameters()]
    for k, param in enumerate(model.parameters()):
        param.grad = normal(param.shape, k)
    model[1].weight.grad[3, 4] = torch.nan
    step()
    changed = [not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)]
    assert changed == [True, False, True, True]
    with pytest.raises(sinkgd.NonFiniteGradientError, match=r"1\.weight"):
        step()


def test_sr_sinkhorn_may_be_compiled_whole():
    grad = normal((24, 40))
    compiled = torch.compile(sinkgd.sr_sinkhorn, backend="aot_eager", fullgraph=True)
    expected = sinkhorn_knopp(grad.double() ** 2, 5).sqrt() * grad.sign()
    torch.testing.assert_close(compiled(grad).double(), expected, rtol=3e-6, atol=0)


@pytest.mark.slow
def test_the_default_compiler_takes_it():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    compiled = walk("sinkgd", "inductor")
    for one, other in zip(compiled, walk("sinkgd"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
