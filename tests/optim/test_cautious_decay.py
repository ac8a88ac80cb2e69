"""Cautious decay: λ applies where the update moves a weight toward zero, with every method."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close

import sinkgd
from optim.test_option_pairs import OPTIONS
from optimizer_cases import ABSENT, optimizer_of
from option_reference import Expected
from sinkgd.kernels.rounding import keys_of_step, round_to_bfloat16
from sinkgd.optim.methods import METHODS
from spawn import on_ranks
from test_sharded import distributed

LR, DECAY = 0.0625, 0.5
STEPS = 3
SHAPE = (9, 14)
CAUTIOUS = {"lr": LR, "weight_decay": DECAY, "cautious_decay": True}
# Whose steps do not go through torch's AdamW, so that one kernel writes all of them.
OURS = ["sinkgd", "sinkgd-table", "swan", "mngd", "normalize", "stateless", "tempered", "sage"]
TORCHS = ["adamw", "spam", "adamw-spam", *({"adamw-8bit"} - ABSENT)]

every = pytest.mark.parametrize("algorithm", [*OURS, *TORCHS])
ascents = pytest.mark.parametrize("maximize", [False, True], ids=["descent", "ascent"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def test_every_method_is_tried():
    assert {*OURS, *TORCHS} == {*METHODS} - ABSENT


def normal(seed=0, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def gradient(seed, shape=SHAPE, dtype=torch.float32):
    """A gradient with a zero row, more zeros, and otherwise no entry so small that it is lost."""
    grad = normal(seed, shape).pow(3)
    grad += 0.25 * grad.sign()
    grad.view(-1)[::11] = 0
    if len(shape) > 1:
        grad[2:3] = 0
    return grad.to(dtype)


def decayed(weight, moved):
    """Restate the rule in float64, entry by entry: W + move − ηλW where both have other signs."""
    entries = zip(weight.double().flatten().tolist(), moved.flatten().tolist(), strict=True)
    found = [
        w + move - (LR * DECAY * w if math.copysign(1, w) * move < 0 else 0) for w, move in entries
    ]
    return torch.tensor(found, dtype=torch.float64).view(weight.shape)


def twins(algorithm, dtype=torch.float32, shape=SHAPE, **options):
    """Optimizers of equal weights: cautious, decaying all, and decaying nothing."""
    weights = [nn.Parameter(normal(9, shape, dtype)) for _ in range(3)]
    differing = {"cautious_decay": True}, {}, {"weight_decay": 0.0}
    return weights, [
        optimizer_of(
            [{"params": [weight], "weight_decay": DECAY, **own, **options}], algorithm, lr=LR
        )
        for weight, own in zip(weights, differing, strict=True)
    ]


def step_all(weights, optimizers, grad):
    """Take a step of all from the weights of the first; return these, and the weights then."""
    before = weights[0].detach().clone()
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.data.copy_(before)
        weight.grad = grad.clone()
        optimizer.step()
    return before, [weight.detach().clone() for weight in weights]


class TestEveryMethod:
    @every
    @ascents
    def test_entries_that_move_toward_zero_decay_alone(self, algorithm, maximize):
        weights, optimizers = twins(algorithm, maximize=maximize)
        for seed in range(STEPS):
            before, (found, _, plain) = step_all(weights, optimizers, gradient(seed))
            expected = decayed(before, plain.double() - before.double())
            assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
            assert not torch.equal(found, plain)

    @pytest.mark.parametrize("algorithm", OURS)
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @dtypes
    def test_an_entry_has_the_bits_of_one_of_the_other_steps(self, algorithm, rounding, dtype):
        weights, optimizers = twins(algorithm, dtype, rounding=rounding, seed=3)
        wide, probes = twins(algorithm)
        for seed in range(STEPS):
            grad = gradient(seed, dtype=dtype)
            before, (found, all_decay, none) = step_all(weights, optimizers, grad)
            wide[0].data.copy_(before)
            start, (_, _, moved) = step_all(wide, probes, grad.float())
            toward = (moved - start).sign() * start.sign() < 0
            assert torch.equal(found, torch.where(toward, all_decay, none))

    @every
    @dtypes
    def test_without_decay_it_changes_no_bit(self, algorithm, dtype):
        found = []
        for own in ({"cautious_decay": True}, {}):
            weight = nn.Parameter(normal(9, dtype=dtype))
            group = {"params": [weight], **own}
            optimizer = optimizer_of([group], algorithm, lr=LR, weight_decay=0.0)
            for seed in range(STEPS):
                weight.grad = gradient(seed, dtype=dtype)
                optimizer.step()
            states = [x for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor)]
            found.append([weight.detach(), *states])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    @every
    def test_the_rate_may_be_a_tensor(self, algorithm):
        found = []
        for lr in (LR, torch.tensor(LR)):
            weight = nn.Parameter(normal(9))
            optimizer = optimizer_of([weight], algorithm, **{**CAUTIOUS, "lr": lr})
            for seed in range(STEPS):
                weight.grad = gradient(seed)
                optimizer.step()
            found.append(weight.detach())
        assert_close(*found, rtol=1e-6, atol=1e-7)

    @every
    def test_a_released_gradient_gives_the_same_bits(self, algorithm):
        if METHODS[algorithm].needs_all_gradients:
            pytest.skip("it needs all gradients at once")
        found = []
        for released in (False, True):
            weight = nn.Parameter(normal(9))
            optimizer = optimizer_of([weight], algorithm, **CAUTIOUS)
            release = sinkgd.GradientRelease(optimizer) if released else None
            for seed in range(STEPS):
                (weight * gradient(seed)).sum().backward()
                assert (weight.grad is None) == released
                optimizer.step()
                optimizer.zero_grad()
            if release:
                release.remove()
            found.append(weight.detach())
        assert torch.equal(*found)

    @every
    def test_a_bad_gradient_moves_nothing(self, algorithm):
        weight = nn.Parameter(normal(9))
        optimizer = optimizer_of([weight], algorithm, nonfinite="skip", **CAUTIOUS)
        weight.grad = gradient(0)
        weight.grad[3, 4] = torch.inf
        optimizer.step()
        assert torch.equal(weight, normal(9))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("algorithm", ["sinkgd", "mngd", "adamw"])
@dtypes
def test_a_compiled_step_is_the_plain_one(algorithm, dtype):
    found = []
    for compiles in (False, True):
        torch._dynamo.reset()
        weight = nn.Parameter(normal(9, dtype=dtype))
        optimizer = optimizer_of([weight], algorithm, **CAUTIOUS)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for seed in range(STEPS):
            weight.grad = gradient(seed, dtype=dtype)
            step()
        found.append(weight.detach())
    assert_close(*found, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
@ascents
def test_steps_are_those_of_the_formula(every_backend, name, maximize):
    options = {k: v for k, v in OPTIONS[name].items() if k not in ("weight_decay", "maximize")}
    if options.keys() & {"cautious_decay", "split", "layout", "warm_start", "tol"}:
        pytest.skip("the reference has no such option")
    if "constant_norm" in options:
        pytest.skip("constant_norm refuses weight decay")
    options = {"sinkhorn_iterations": 3, **options}
    weight, expected = nn.Parameter(normal(9)), Expected(torch.zeros(SHAPE), **options)
    group = {"params": [weight], "algorithm": "sinkgd", "maximize": maximize, **CAUTIOUS, **options}
    optimizer = sinkgd.SinkGD([group])
    known = weight.detach().double()
    for seed in range(STEPS):
        grad = normal(seed).pow(3)
        if "cross_fit" in options:
            held = normal(100 + seed).pow(3)
            weight.grad = held.clone()
            optimizer.hold_out()
            expected.hold_out(held)
        weight.grad = grad.clone()
        optimizer.step()
        expected.weight = known  # which some updates depend on
        update = expected.step(grad)
        known = decayed(known, LR * update if maximize else -LR * update)
        assert_close(weight.double(), known, rtol=2e-5, atol=4e-6)


class TestAdamW:
    @staticmethod
    def reference(weight, grads, *, maximize=False, betas=(0.8, 0.95), eps=1e-6):
        """Adam as it is printed, in float64."""
        m = v = torch.zeros(weight.shape, dtype=torch.float64)
        for t, grad in enumerate(grads, 1):
            g = -grad.double() if maximize else grad.double()
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
            direction = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            weight = decayed(weight, -LR * direction)
        return weight, m, v

    @ascents
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_it_follows_adams_direction(self, dtype, fused, maximize):
        weight, grads = (
            nn.Parameter(normal(9, dtype=dtype)),
            [normal(i, dtype=dtype) for i in range(5)],
        )
        options = {"betas": (0.8, 0.95), "eps": 1e-6, "fused": fused, "maximize": maximize}
        group = {"params": [weight], "algorithm": "adamw", **CAUTIOUS, **options}
        optimizer = sinkgd.SinkGD([group])
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        expected, m, v = self.reference(normal(9).double(), grads, maximize=maximize)
        exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
        assert_close(weight.double(), expected, **exact)
        assert_close(optimizer.state[weight]["exp_avg"].double(), m, **exact)
        assert_close(optimizer.state[weight]["exp_avg_sq"].double(), v, **exact)
        assert optimizer.state[weight]["step"] == len(grads)

    @dtypes
    @pytest.mark.parametrize("fused", [True, False])
    def test_moments_are_those_of_plain_decay(self, dtype, fused):
        weights, optimizers = twins("adamw", dtype, fused=fused)
        for seed in range(STEPS):
            step_all(weights, optimizers, gradient(seed, dtype=dtype))
        one, other = (o.state[w] for o, w in zip(optimizers[:2], weights[:2], strict=True))
        # Unless it is fused, torch rounds to bfloat16 after every operation.
        exact = {"rtol": 0, "atol": 0} if dtype == torch.float32 or fused else {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert one[key].dtype == other[key].dtype
            assert_close(one[key], other[key], **exact)

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_bfloat16_is_rounded_once(self, rounding):
        narrow = nn.Parameter(normal(9, dtype=torch.bfloat16))
        wide = nn.Parameter(narrow.detach().float())
        group = {"params": [narrow], "algorithm": "adamw", "rounding": rounding, "seed": 5}
        narrow.grad = gradient(0, dtype=torch.bfloat16)
        wide.grad = narrow.grad.float()
        sinkgd.SinkGD([{**group, **CAUTIOUS}]).step()
        sinkgd.SinkGD([{"params": [wide], "algorithm": "adamw", **CAUTIOUS}]).step()
        expected = wide.detach().bfloat16()
        if rounding == "stochastic":
            expected = round_to_bfloat16(wide.detach(), keys_of_step(5, torch.tensor(0), 1)[0])
        assert torch.equal(narrow, expected)

    @dtypes
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("shape", [(24, 40), (960,), (4, 6, 5, 8), (), (0, 4)], ids=str)
    @pytest.mark.parametrize("algorithm", ["adamw", "adamw-spam"])
    def test_parts_have_the_same_bits(self, algorithm, shape, rounding, dtype, monkeypatch):
        options = {"rounding": rounding} if algorithm == "adamw" else {}
        found = []
        for chunk in (1 << 18, 160):  # whole vectors, as torch's kernel rounds others otherwise
            monkeypatch.setattr("sinkgd.optim.methods.adamw._CPU_CHUNK", chunk)
            start = normal(9, shape, dtype)
            if len(shape) == 4:
                start = start.contiguous(memory_format=torch.channels_last)
            weight = nn.Parameter(start)
            optimizer = optimizer_of([weight], algorithm, **CAUTIOUS, **options)
            for seed in range(STEPS):
                weight.grad = gradient(seed, shape, dtype)
                optimizer.step()
            found.append([weight.detach(), *optimizer.state[weight].values()])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        if weight.numel():
            assert optimizer.state[weight]["step"] == STEPS

    def test_a_scaled_loss_and_its_overflow(self):
        plain, scaled = nn.Parameter(normal(9)), nn.Parameter(normal(9))
        one, other = (
            sinkgd.SinkGD([{"params": [w], "algorithm": "adamw", "fused": True, **CAUTIOUS}])
            for w in (plain, scaled)
        )
        plain.grad, scaled.grad = gradient(0), 1024 * gradient(0)
        one.step()
        other.grad_scale, other.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        other.step()
        assert torch.equal(plain, scaled)
        other.found_inf = torch.tensor(1.0)
        other.step()
        assert torch.equal(plain, scaled)


class TestState:
    @staticmethod
    def saved(optimizer):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return torch.load(io.BytesIO(file.getvalue()))

    @every
    def test_a_resumed_run_ends_with_the_same_bits(self, algorithm):
        def walk(weight, optimizer, seeds):
            for seed in seeds:
                weight.grad = gradient(seed)
                optimizer.step()

        whole = nn.Parameter(normal(9))
        walk(whole, optimizer_of([whole], algorithm, **CAUTIOUS), range(5))
        part = nn.Parameter(normal(9))
        optimizer = optimizer_of([part], algorithm, **CAUTIOUS)
        walk(part, optimizer, range(2))
        saved = self.saved(optimizer)
        assert saved["param_groups"][0]["cautious_decay"] is True
        resumed = nn.Parameter(part.detach().clone())
        optimizer = optimizer_of([resumed], algorithm)  # the option is loaded
        optimizer.load_state_dict(saved)
        walk(resumed, optimizer, range(2, 5))
        assert torch.equal(resumed, whole)

    @every
    def test_checkpoints_without_the_key_have_decayed_all(self, algorithm):
        weight = nn.Parameter(normal(9))
        optimizer = optimizer_of([weight], algorithm, **CAUTIOUS)
        saved = self.saved(optimizer)
        del saved["param_groups"][0]["cautious_decay"]
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["cautious_decay"] is False

    def test_pickles_without_the_key_do_too(self):
        optimizer = sinkgd.SinkGD([nn.Parameter(normal(9))], lr=LR)
        for options in (optimizer.defaults, *optimizer.param_groups):
            del options["cautious_decay"]
        found = pickle.loads(pickle.dumps(optimizer))
        found.add_param_group({"params": [nn.Parameter(normal(9))]})
        assert [group["cautious_decay"] for group in found.param_groups] == [False, False]

    def test_a_copy_keeps_it(self):
        optimizer = sinkgd.SinkGD([nn.Parameter(normal(9))], **CAUTIOUS)
        assert copy.deepcopy(optimizer).param_groups[0]["cautious_decay"] is True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 7)


class TestParamGroups:
    def test_every_group_gets_it(self):
        groups = sinkgd.param_groups(Model(), adamw_lr=1e-3, weight_decay=0.1, cautious_decay=True)
        assert {group["algorithm"] for group in groups} == {"sinkgd", "adamw"}
        assert all(group["cautious_decay"] for group in groups)
        optimizer = sinkgd.SinkGD(groups)
        assert optimizer.defaults["cautious_decay"] is True

    def test_the_optimizer_may_set_it_instead(self):
        groups = sinkgd.param_groups(Model(), weight_decay=0.1)
        optimizer = sinkgd.SinkGD(groups, cautious_decay=True)
        assert all(group["cautious_decay"] for group in optimizer.param_groups)

    def test_an_override_decides_for_its_own(self):
        overrides = {"head": {"cautious_decay": False}}
        groups = sinkgd.param_groups(
            Model(), weight_decay=0.1, cautious_decay=True, overrides=overrides
        )
        found = {name: group["cautious_decay"] for group in groups for name, _ in group["params"]}
        assert not found["head.weight"]
        assert found["layers.0.0.weight"]

    def test_it_is_refused_where_nothing_decays(self):
        with pytest.raises(ValueError, match=r"cautious_decay=True has no effect: no group has a"):
            sinkgd.param_groups(Model(), cautious_decay=True)


# On a mesh ----------------------------------------------------------------------------------------

SHAPES = [(9, 14), (7, 6), (1, 8)]  # of the last, one rank has nothing
WALKS = {
    "sinkgd": {"algorithm": "sinkgd"},
    "deflated": {"algorithm": "sinkgd", "deflated_rank": 2},
    "at random": {"algorithm": "sinkgd", "rounding": "stochastic"},
    "momentum after": {"algorithm": "sinkgd", "momentum": 0.5, "momentum_place": "after"},
    "mngd": {"algorithm": "mngd", "norms": (sinkgd.RowNorm(), sinkgd.SignNorm())},
    "adamw": {"algorithm": "adamw"},
    "adamw at random": {"algorithm": "adamw", "rounding": "stochastic"},
    "tempered": {"algorithm": "tempered"},
    "sage": {"algorithm": "sage"},
}


def walk(name, dtype, mesh=None, **decay):
    """Take steps of several weights; return the weights after each, whole."""
    wholes = [normal(100 + i, shape, dtype) for i, shape in enumerate(SHAPES)]
    lying = (lambda x: x) if mesh is None else (lambda x: distributed(x, mesh, [Shard(0)]))
    params = [nn.Parameter(lying(whole)) for whole in wholes]
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    group = {"params": named, "lr": LR, **WALKS[name], **decay}
    optimizer, found = sinkgd.SinkGD([group]), []
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = lying(gradient(10 * step + i, SHAPES[i], dtype))
        optimizer.step()
        weights = [param.detach() for param in params]
        found += [x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in weights]
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    assert steps in ([], [STEPS] * len(SHAPES))
    return found


DECAYS = {
    "cautious": {"weight_decay": DECAY, "cautious_decay": True},
    "all": {"weight_decay": DECAY},
    "none": {},
}


def walks_by_rows():
    mesh = init_device_mesh("cpu", (2,))
    return {
        (name, dtype, decay): walk(name, dtype, mesh, **DECAYS[decay])
        for name in WALKS
        for dtype in (torch.float32, torch.bfloat16)
        for decay in DECAYS
    }


@pytest.fixture(scope="module")
def by_rows():
    return on_ranks(2, walks_by_rows)


@pytest.mark.parametrize("name", WALKS)
@dtypes
def test_sharded_rows_take_the_steps_of_the_whole(by_rows, name, dtype):
    expected = walk(name, dtype, **DECAYS["cautious"])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    for walks in by_rows:
        for found, whole in zip(walks[name, dtype, "cautious"], expected, strict=True):
            assert_close(found, whole, **tolerance)


@pytest.mark.parametrize("name", [name for name in WALKS if "adamw" not in name])
def test_on_a_mesh_an_entry_has_the_bits_of_one_of_the_other_steps(by_rows, name):
    for walks in by_rows:
        first = [walks[name, torch.float32, decay][: len(SHAPES)] for decay in DECAYS]
        for i, (found, all_decay, none) in enumerate(zip(*first, strict=True)):
            start = normal(100 + i, SHAPES[i])
            toward = (none - start).sign() * start.sign() < 0
            assert torch.equal(found, torch.where(toward, all_decay, none))
            assert not torch.equal(found, all_decay)
