"""Whatever a training loop does, released gradients give the ordinary step, or an error.

A training loop is a list of steps; a step changes parameters, runs micro-batches, and ends. Each
micro-batch reaches some of the parameters. The same list is run with and without `GradientRelease`.
"""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sinkgd
from sinkgd.optim import release
from spawn import on_ranks

SHAPES = [(3, 4), (4, 3), (5,), (2, 3, 3)]
EVERY = tuple(range(len(SHAPES)))

RECIPES = {
    "stateless": lambda params: sinkgd.SinkGD(params, lr=0.1),
    "adamw": lambda params: sinkgd.SinkGD([{"params": params, "algorithm": "adamw"}], lr=0.1),
    "momentum": lambda params: sinkgd.SinkGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "spam": lambda params: sinkgd.SPAM(params, lr=0.1),
    "stochastic": lambda params: sinkgd.SinkGD(params, lr=0.1, rounding="stochastic", seed=3),
}


class Run:
    """The parameters, the optimizer, and the release of one of the two runs."""

    def __init__(self, recipe, is_released, bucket_bytes=0, present=EVERY, frozen=()):
        dtype = torch.bfloat16 if recipe == "stochastic" else torch.float32
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
        ]
        for i in frozen:
            self.params[i].requires_grad_(requires_grad=False)
        self.present = {*present}
        self.optimizer = RECIPES[recipe]([self.params[i] for i in present])
        self.release = (
            sinkgd.GradientRelease(self.optimizer, bucket_bytes=bucket_bytes)
            if is_released
            else None
        )

    def backward(self, reached, seed):
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros(())
        for i in reached:
            param = self.params[i]
            if i in self.present and param.requires_grad:
                noise = torch.randn(param.shape, generator=generator)
                loss = loss + (param.float() * noise).sum() + 0.1 * param.float().square().sum()
        if loss.requires_grad:
            loss.backward()

    def change(self, what, i):
        if what == "add" and i not in self.present:
            self.present.add(i)
            algorithm = self.optimizer.param_groups[0]["algorithm"]
            self.optimizer.add_param_group({"params": [self.params[i]], "algorithm": algorithm})
        if what in {"freeze", "unfreeze"}:
            self.params[i].requires_grad_(requires_grad=what == "unfreeze")

    def step(self, changes, batches, seed, by_closure):
        for what, i in changes:
            self.change(what, i)

        def closure():
            with self.release.accumulate() if self.release else nullcontext():
                for k, reached in enumerate(batches[:-1]):
                    self.backward(reached, 100 * seed + k)
            self.backward(batches[-1], 100 * seed + 99)
            return 0.0

        if by_closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
        if self.release is None:
            self.optimizer.zero_grad()

    def check_nothing_is_left(self):
        assert all(param.grad is None for param in self.params)


def check_alike(recipe, steps, bucket_bytes=0, small_bytes=0, **start):
    ordinary = Run(recipe, is_released=False, **start)
    released = Run(recipe, is_released=True, bucket_bytes=bucket_bytes, **start)
    for seed, (changes, batches, by_closure) in enumerate(steps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(release, "SMALL_BYTES", small_bytes)
            for run in (ordinary, released):
                run.step(changes, batches, seed, by_closure)
        released.check_nothing_is_left()
        for i, (one, other) in enumerate(zip(ordinary.params, released.params, strict=True)):
            assert torch.equal(one, other), f"parameter {i} after step {seed}"


def plain(*batches):
    return [], batches, False


SCENARIOS = {
    "every parameter in every micro-batch": ([plain(EVERY, EVERY)] * 3, {}),
    "some in early micro-batches alone": ([plain(EVERY, (0,))] * 3, {}),
    "some in the last micro-batch alone": ([plain((1,), EVERY)] * 3, {}),
    "some never": ([plain((0, 1), (0,))] * 3, {}),
    "nothing in the last micro-batch": ([plain(EVERY, ())] * 3, {}),
    "no backward at all": ([plain(()), plain(EVERY), plain(())], {}),
    "added later": (
        [plain((0, 1)), ([("add", 2), ("add", 3)], [EVERY, EVERY], False), plain(EVERY)],
        {"present": (0, 1)},
    ),
    "unfrozen later": (
        [plain(EVERY), ([("unfreeze", 1)], [EVERY, EVERY], False), plain(EVERY), plain(EVERY)],
        {"frozen": (1,)},
    ),
    "frozen for a while": (
        [
            plain(EVERY),
            ([("freeze", 0)], [EVERY], False),
            ([("unfreeze", 0)], [EVERY, (0,)], False),
            plain(EVERY),
        ],
        {},
    ),
    "in closures": ([([], [EVERY, (0, 1)], True)] * 3, {}),
    "unfrozen before a closure": (
        [plain(EVERY), ([("unfreeze", 1)], [EVERY], True), ([], [EVERY], True)],
        {"frozen": (1,)},
    ),
}


@pytest.mark.parametrize(
    ("bucket_bytes", "small_bytes"), [(0, 0), (0, 40), (0, 1 << 16), (60, 1 << 16), (1 << 30, 0)]
)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_is_the_ordinary_step(scenario, recipe, bucket_bytes, small_bytes):
    steps, start = SCENARIOS[scenario]
    check_alike(recipe, steps, bucket_bytes, small_bytes, **start)


batches = st.lists(st.sets(st.sampled_from(EVERY)).map(sorted), min_size=1, max_size=3)
changes = st.lists(
    st.tuples(st.sampled_from(["add", "freeze", "unfreeze"]), st.sampled_from(EVERY)), max_size=2
)


@settings(max_examples=60, deadline=None)
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    steps=st.lists(st.tuples(changes, batches, st.booleans()), min_size=1, max_size=4),
    bucket_bytes=st.sampled_from([0, 40, 100, 1 << 20]),
    small_bytes=st.sampled_from([0, 40, 1 << 16]),
    present=st.sets(st.sampled_from(EVERY), min_size=1).map(sorted),
    frozen=st.sets(st.sampled_from(EVERY)).map(sorted),
)
def test_it_is_the_ordinary_step_of_any_loop(
    recipe, steps, bucket_bytes, small_bytes, present, frozen
):
    check_alike(recipe, steps, bucket_bytes, small_bytes, present=tuple(present), frozen=frozen)


# Errors -------------------------------------------------------------------------------------------


class Failing(torch.autograd.Function):
    """A function whose backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("out of luck")


@pytest.fixture
def at_once(monkeypatch):
    """No gradient is too small to be applied at once."""
    monkeypatch.setattr(release, "SMALL_BYTES", 0)


def fail_after(first, second):
    """Run a backward that reaches ``first``, and raises before it reaches ``second``."""
    with pytest.raises(ArithmeticError):
        (Failing.apply(second.sum()) * first.sum()).backward()


def two_weights(**options):
    weights = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = sinkgd.SinkGD([("one", weights[0]), ("two", weights[1])], lr=0.1)
    return *weights, optimizer, sinkgd.GradientRelease(optimizer, **options)


@pytest.mark.usefixtures("at_once")
def test_after_an_exception_in_backward_each_call_says_what_to_do():
    one, two, optimizer, release = two_weights()
    fail_after(one, two)
    assert one.ne(1).all()
    with pytest.raises(RuntimeError, match=r"'one' got a second gradient.*release\.reset"):
        (one * two).sum().backward()
    with pytest.raises(RuntimeError, match=r"backward raised an exception.*release\.reset"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"backward raised an exception.*release\.reset"):
        optimizer.step(lambda: 0.0)
    release.reset()
    assert one.grad is None
    assert two.grad is None
    before = one.detach().clone()
    (one * two).sum().backward()
    optimizer.step()
    assert one.ne(before).all()
    assert two.ne(1).all()


@pytest.mark.parametrize("bucket_bytes", [0, 1 << 30])
def test_an_exception_before_anything_was_applied_is_as_in_the_ordinary_loop(bucket_bytes):
    one, two, optimizer, _ = two_weights(bucket_bytes=bucket_bytes)
    fail_after(one, two)
    optimizer.zero_grad()
    (one * two).sum().backward()
    optimizer.step()
    assert one.ne(1).all()
    assert torch.equal(one, two)


@pytest.mark.usefixtures("at_once")
def test_an_exception_in_a_closure_says_what_to_do():
    one, two, optimizer, release = two_weights()

    def closure():
        (Failing.apply(two.sum()) * one.sum()).backward()

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match=r"release\.reset"):
        optimizer.step()
    release.reset()
    optimizer.step()


def test_backward_before_step_of_a_closure_is_refused():
    one, two, optimizer, _ = two_weights()
    (one * two).sum().backward()
    with pytest.raises(RuntimeError, match=r"applied before step\(closure\) was called"):
        optimizer.step(lambda: (one * two).sum().backward())


def test_a_micro_batch_after_the_last_one_is_refused():
    one, two, _, release = two_weights()
    (one.sum() + two.sum()).backward()
    with release.accumulate(), pytest.raises(RuntimeError, match="got a second gradient"):
        one.sum().backward()


def test_nested_accumulation_ends_with_the_outermost():
    one, two, optimizer, release = two_weights()
    with release.accumulate():
        with release.accumulate():
            one.sum().backward()
        two.sum().backward()
        assert one.eq(1).all()
        assert two.eq(1).all()
    (one * two).sum().backward()
    assert one.ne(1).all()
    optimizer.step()


def test_the_loss_of_another_model_is_refused():
    generator, generators, *_ = two_weights()
    del generators
    critic, _, critics, _ = two_weights()
    (generator * critic).sum().backward()
    critics.step()
    with pytest.raises(RuntimeError, match="the loss of another model reaches this one"):
        (generator * critic).sum().backward()


def test_a_parameter_is_released_once():
    weight, _, optimizer, release = two_weights()
    with pytest.raises(ValueError, match=r"'one' is released by another.*remove\(\)"):
        sinkgd.GradientRelease(optimizer)
    with pytest.raises(ValueError, match="is released by another GradientRelease"):
        sinkgd.GradientRelease(sinkgd.SinkGD([weight]))
    release.remove()
    sinkgd.GradientRelease(sinkgd.SinkGD([weight])).remove()


def test_a_parameter_that_left_the_optimizer_keeps_its_gradient():
    one, two, optimizer, _ = two_weights()
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["param_names"].pop()
    (one.sum() + two.sum()).backward()
    assert one.grad is None
    assert two.grad is not None
    optimizer.step()
    assert two.eq(1).all()


def test_an_exception_inside_with_applies_nothing_more():
    one, two, optimizer, release = two_weights(bucket_bytes=1 << 30)
    release.remove()

    def interrupted():
        with sinkgd.GradientRelease(optimizer, bucket_bytes=1 << 30):
            (one * two).sum().backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert one.eq(1).all()
    assert one.grad is not None


def test_gradient_of_no_entries_is_freed():
    full, empty = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(0, 4))
    optimizer = sinkgd.SinkGD([full, empty], lr=0.1)
    sinkgd.GradientRelease(optimizer)
    for _ in range(2):
        (full.sum() + empty.sum()).backward()
        optimizer.step()
        assert empty.grad is None


@pytest.mark.parametrize("unscale_first", [True, False])
def test_a_real_scaler_is_refused(unscale_first):
    one, two, optimizer, release = two_weights()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((one * two).sum()).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    with pytest.raises(TypeError, match="a GradScaler looks at all gradients after backward"):
        scaler.step(optimizer)
    optimizer.step()  # a later step without the scaler is not refused
    release.remove()


# On ranks -----------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x, *, both):
        return self.one(x) + self.other(x) if both else self.one(x)


def early_micro_batches_on_mesh():
    """Train both ways under FSDP2, and say whether bits are equal and gradients freed."""
    mesh, trained = init_device_mesh("cpu", (2,)), []
    for is_released in (False, True):
        model = Branches()
        for branch in (model.one, model.other):
            fully_shard(branch, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = sinkgd.SinkGD(model.named_parameters(), lr=0.1)
        release = sinkgd.GradientRelease(optimizer) if is_released else None
        for seed in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
            with release.accumulate() if release else nullcontext():
                model(x, both=True).square().mean().backward()
            model(x, both=False).square().mean().backward()
            optimizer.step()
            if release is None:
                optimizer.zero_grad()
        trained.append(model)
    ordinary, released = (list(model.parameters()) for model in trained)
    equal = [
        torch.equal(a.to_local(), b.to_local()) for a, b in zip(ordinary, released, strict=True)
    ]
    return all(equal) and all(param.grad is None for param in released)


def test_under_fsdp2_it_is_the_ordinary_step_too():
    assert all(on_ranks(2, early_micro_batches_on_mesh))
