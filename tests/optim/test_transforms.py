"""Every transform, alone and with every other: what each owes, whatever its mathematics."""

import io
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

import sinkgd
from one_matrix import heavy
from optim.test_chunking import limited
from optim.test_option_pairs import OPTIONS, REFUSED
from sinkgd.optim.methods import METHODS
from sinkgd.optim.methods.sinkhorn import _active
from sinkgd.optim.transforms import TRANSFORMS
from spawn import on_ranks

SHAPES = [(9, 14), (1, 6), (7, 1), (1, 1), (3, 5, 4)]  # of two ranks, one holds nothing of (1, 6)


def turns_on(transform, options):
    return transform.switch in options and _active({**DEFAULTS, **options}) == [transform]


DEFAULTS = METHODS["sinkgd"].options
# The rows of OPTIONS by the transform that each turns on.
ROWS = {own: [name for name in OPTIONS if turns_on(own, OPTIONS[name])] for own in TRANSFORMS}
NAMES = [name for names in ROWS.values() for name in names]
SETS = {name: OPTIONS[name] for name in NAMES} | {
    f"{a} + {b}": OPTIONS[a] | OPTIONS[b]
    for one, other in combinations(TRANSFORMS, 2)
    for a in ROWS[one]
    for b in ROWS[other]
    if {a, b} not in [{*pair.split(" + ")} for pair in REFUSED]
}
every = pytest.mark.parametrize("name", SETS)


def as_it_is(x):
    return x


class Run:
    """Parameters of all shapes, and their optimizer."""

    def __init__(self, options, lying=as_it_is, params=None):
        self.lying, self.holds_out = lying, "cross_fit" in options
        if params is None:
            params = [lying(heavy(10 + i, shape)) for i, shape in enumerate(SHAPES)]
        self.params = [nn.Parameter(param) for param in params]
        group = {"params": self.params, "algorithm": "sinkgd", **options}
        self.optimizer = sinkgd.SinkGD([group], lr=0.1, nonfinite="skip")

    def step(self, seed, spoiled=None):
        if self.holds_out:
            for i, param in enumerate(self.params):
                param.grad = self.lying(heavy(1000 + 10 * seed + i, SHAPES[i]))
            self.optimizer.hold_out()
        for i, param in enumerate(self.params):
            grad = heavy(10 * seed + i, SHAPES[i])
            if i == spoiled:
                grad[..., -1, -1] = torch.nan
            param.grad = self.lying(grad)
        self.optimizer.step()

    def weights(self):
        return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in self.params]

    def states(self, param):
        return {key: value.clone() for key, value in self.optimizer.state[param].items()}


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda own: type(own).__name__)
def test_options_of_a_transform_are_options_of_the_method_and_turn_it_on(transform):
    assert ROWS[transform], f"no row of OPTIONS turns on {type(transform).__name__} alone"
    assert transform.options.items() <= DEFAULTS.items()
    assert transform.switch in transform.options


def test_no_two_transforms_share_an_option_and_all_are_off_by_default():
    names = [name for transform in TRANSFORMS for name in transform.options]
    assert len(names) == len({*names})
    assert not _active(DEFAULTS)


@every
def test_matrices_of_every_shape_take_finite_steps(name):
    run = Run(SETS[name])
    before = run.weights()
    for seed in range(3):
        run.step(seed)
    for weight, old in zip(run.weights(), before, strict=True):
        assert weight.isfinite().all()
        if not is_fixed(weight.shape, SETS[name]):
            assert not torch.equal(weight, old)


def is_fixed(shape, options):
    """Whether the options leave a matrix of this shape nowhere to go."""
    return (options.get("weight_projection") and shape[-1] == 1) or (
        options.get("constant_norm") and shape == (1, 1)
    )


@every
def test_nan_in_a_gradient_changes_neither_its_weight_nor_its_state(name):
    run, other = Run(SETS[name]), Run(SETS[name])
    for each in (run, other):
        each.step(0)
    weights, states = run.weights(), run.states(run.params[0])
    run.step(1, spoiled=0)
    other.step(1)
    found = run.weights()
    assert torch.equal(found[0], weights[0])
    kept = run.states(run.params[0])
    assert kept.keys() == states.keys()
    assert equal(kept.values(), states.values())
    assert equal(found[1:], other.weights()[1:])


@every
@pytest.mark.parametrize("size", [0, 600])
def test_how_many_matrices_a_chunk_holds_changes_no_bit(monkeypatch, name, size):
    together, few = Run(SETS[name]), Run(SETS[name])
    for seed in range(2):
        together.step(seed)
    limited(monkeypatch, size)
    for seed in range(2):
        few.step(seed)
    assert equal(together.weights(), few.weights())


@every
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(name):
    whole, part = Run(SETS[name]), Run(SETS[name])
    for seed in range(4):
        whole.step(seed)
    for seed in range(2):
        part.step(seed)
    file = io.BytesIO()
    torch.save((part.weights(), part.optimizer.state_dict()), file)
    weights, state = torch.load(io.BytesIO(file.getvalue()))
    resumed = Run(SETS[name], params=weights)
    resumed.optimizer.load_state_dict(state)
    for seed in range(2, 4):
        resumed.step(seed)
    assert equal(resumed.weights(), whole.weights())


@every
def test_init_state_creates_what_a_first_step_creates(name):
    stepped, made = Run(SETS[name]), Run(SETS[name])
    made.optimizer.init_state()
    stepped.step(0)
    for one, other in zip(stepped.params, made.params, strict=True):
        forms = [
            {key: (x.shape, x.dtype) for key, x in run.optimizer.state[param].items()}
            for run, param in ((stepped, one), (made, other))
        ]
        assert forms[0] == forms[1]
    made.step(0)
    assert equal(made.weights(), stepped.weights())


def run_on_two(limit):
    """Walk all sets, by rows and by columns; return the weights, or why a set is refused."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        limited(patch, limit)
        for name, options in SETS.items():
            for dim in (-2, -1):
                try:
                    run = Run(options, lambda x, d=dim: distribute_tensor(x, mesh, [Shard(d)]))
                except ValueError as error:
                    found[name, dim] = str(error)
                    continue
                for seed in range(2):
                    run.step(seed, spoiled=2 if seed else None)
                found[name, dim] = run.weights()
    return found


@pytest.mark.slow
def test_shards_take_the_steps_of_whole_matrices_in_chunks_of_any_size():
    many, few = on_ranks(2, run_on_two, 1 << 20), on_ranks(2, run_on_two, 300)
    expected = {}
    for name, options in SETS.items():
        run = Run(options)
        for seed in range(2):
            run.step(seed, spoiled=2 if seed else None)
        expected[name] = run.weights()
    for found, chunked in zip(many, few, strict=True):
        for (name, dim), weights in found.items():
            if isinstance(weights, str):
                assert "warm_start=True needs whole" in weights
                continue
            for one, other, own in zip(weights, chunked[name, dim], expected[name], strict=True):
                # Not always the same bits: a sum may begin elsewhere in the list of all matrices.
                assert_close(one, other, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
                # Steps are about 0.1, and deflation multiplies in float32.
                assert_close(one, own, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
