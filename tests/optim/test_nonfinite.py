"""NaN and infinity never reach a weight, and nobody has to look for where they came from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sinkgd
from optimizer_cases import ABSENT, optimizer_of
from sinkgd.optim import nonfinite
from sinkgd.optim.methods import METHODS

BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
ALGORITHMS = pytest.mark.parametrize("algorithm", sorted({*METHODS} - ABSENT))


def a_pair(algorithm, bad, policy):
    """Two parameters in two groups; the gradient of the second has one bad entry."""
    good, ill = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 5))
    good.grad, ill.grad = torch.randn(4, 3), torch.randn(3, 5)
    ill.grad[1, 2] = bad
    groups = [
        {"params": [("good", good)]},
        {"params": [("layers.3.ill", ill)], "weight_decay": 0.1},
    ]
    return good, ill, optimizer_of(groups, algorithm, lr=0.1, nonfinite=policy)


@BAD
@ALGORITHMS
def test_raise_names_the_parameter_and_leaves_it_alone(algorithm, bad):
    good, ill, optimizer = a_pair(algorithm, bad, "raise")
    with pytest.raises(sinkgd.NonFiniteGradientError, match=r"gradient of layers\.3\.ill holds"):
        optimizer.step()
    assert good.ne(1).all()
    assert ill.eq(1).all()


@BAD
@ALGORITHMS
def test_raise_names_every_bad_parameter_of_the_step(algorithm, bad):
    good, ill, optimizer = a_pair(algorithm, bad, "raise")
    good.grad[2, 2] = bad
    with pytest.raises(sinkgd.NonFiniteGradientError, match=r"of good and layers\.3\.ill hold NaN"):
        optimizer.step()
    assert good.eq(1).all()
    assert ill.eq(1).all()
    good.grad, ill.grad = torch.randn(4, 3), torch.randn(3, 5)
    optimizer.step()  # what was said is not said again
    assert ill.ne(1).all()


@BAD
@ALGORITHMS
def test_skip_leaves_that_parameter_alone_and_counts(algorithm, bad):
    good, ill, optimizer = a_pair(algorithm, bad, "skip")
    optimizer.step()
    assert good.ne(1).all()
    assert ill.eq(1).all()
    optimizer.step()
    assert optimizer.skipped() == {"layers.3.ill": 2}


@BAD
@pytest.mark.parametrize("fused", [False, True])
def test_a_group_of_adamw_is_left_unchanged_as_a_whole(bad, fused):
    good, ill = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 5))
    good.grad, ill.grad = torch.randn(4, 3), torch.full((3, 5), bad)
    params = [("good", good), ("ill", ill)]
    optimizer = optimizer_of([{"params": params, "fused": fused}], "adamw", nonfinite="skip")
    optimizer.step()
    assert good.eq(1).all()
    assert ill.eq(1).all()
    assert optimizer.skipped() == {"ill": 1}
    ill.grad = torch.randn(3, 5)
    optimizer.step()
    assert good.ne(1).all()
    assert ill.ne(1).all()


@BAD
def test_one_bad_part_of_a_split_parameter_holds_back_all_of_it(bad):
    fused = nn.Parameter(torch.ones(6, 4))
    fused.grad = torch.randn(6, 4)
    fused.grad[5, 0] = bad
    optimizer = sinkgd.SinkGD(
        [{"params": [("qkv", fused)], "algorithm": "sinkgd", "split": 3}], nonfinite="skip"
    )
    optimizer.step()
    assert fused.eq(1).all()
    assert optimizer.skipped() == {"qkv": 1}


def test_unnamed_parameters_are_told_by_their_place():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.full((2, 2), float("nan"))
    with pytest.raises(sinkgd.NonFiniteGradientError, match="parameter 0 of group 0"):
        sinkgd.SinkGD([weight]).step()


@pytest.mark.gpu
def test_on_a_gpu_the_error_comes_with_the_next_step_and_the_weight_stays():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; run this on a machine with CUDA or ROCm")
    weight = nn.Parameter(torch.ones(4, 3, device="cuda"))
    optimizer = sinkgd.SinkGD([("w", weight)])
    weight.grad = torch.full((4, 3), float("nan"), device="cuda")
    optimizer.step()
    assert weight.eq(1).all()
    weight.grad = torch.randn(4, 3, device="cuda")
    with pytest.raises(sinkgd.NonFiniteGradientError, match="gradient of w holds"):
        optimizer.step()


class TestOfAnAccelerator:
    """The way of flags to the host, on a device that is made up."""

    DEVICE = torch.device("cuda", 1)

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []

        class Event:
            def __init__(self, device):
                calls.append(("event", torch.device(device)))

            def record(self, stream=None):
                calls.append(("record", stream))

            def synchronize(self):
                calls.append(("wait",))

        host = SimpleNamespace(copy_=lambda flags, non_blocking: torch.tensor([False]))
        monkeypatch.setattr(nonfinite.torch, "empty", lambda *_, **__: host)
        monkeypatch.setattr(nonfinite.torch, "Event", Event)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"of {device}")
        return calls

    def take(self, guard):
        flags = SimpleNamespace(shape=(1,), device=self.DEVICE, is_cuda=True)
        guard.take(["w"], flags, "raise")
        guard.end_step()

    def test_nothing_waits_while_a_graph_is_captured_and_nothing_is_lost(self, calls, monkeypatch):
        guard = nonfinite.NonFiniteGuard()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        self.take(guard)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            guard.read_flags()
            self.take(guard)
        assert guard.skipped() == {}
        assert ("wait",) not in calls
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with pytest.raises(sinkgd.NonFiniteGradientError, match="gradient of w holds"):
            guard.read_flags()

    def test_the_event_is_of_the_flags_device_and_stream(self, calls, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        self.take(nonfinite.NonFiniteGuard())
        assert calls == [("event", self.DEVICE), ("record", "of cuda:1")]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "the gradient of w0 holds NaN or infinity; the parameter was left unchanged. Lower"),
        (2, "the gradients of w0 and w1 hold NaN or infinity; these parameters were left"),
        (5, "the gradients of w0, w1, w2, w3 and w4 hold NaN or infinity; these parameters"),
        (24, "the gradients of w0, w1, w2, w3, w4 and 19 more hold NaN or infinity; these"),
    ],
)
def test_the_error_names_five_parameters_and_counts_the_others(count, said):
    weights = [(f"w{i}", nn.Parameter(torch.ones(2, 2))) for i in range(count)]
    optimizer = sinkgd.SinkGD(weights, lr=0.1)
    for _, weight in weights:
        weight.grad = torch.full((2, 2), torch.nan)
    with pytest.raises(sinkgd.NonFiniteGradientError, match=said):
        optimizer.step()
