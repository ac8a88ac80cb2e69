"""DeepSpeed's engine trains with SinkGD without ZeRO, and SinkGD refuses ZeRO by name.

`make test-plugin-deepspeed` runs it, with the versions in pins/deepspeed.txt.
The first run compiles DeepSpeed's communication for CPUs, which takes two minutes.
"""

import pytest
import torch
from torch import nn

import sinkgd

pytest.importorskip(
    "deepspeed", reason="`make test-plugin-deepspeed` runs it", exc_type=ImportError
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and of what it imports


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    for name, value in {"DS_ACCELERATOR": "cpu", **ranks, **address}.items():
        monkeypatch.setenv(name, value)


def engine_of(**settings):
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4))
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine, seeds):
    dtype = next(engine.parameters()).dtype
    for seed in seeds:
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(x.to(dtype)).square().mean())
        engine.step()


def copy_of(engine):
    return [param.detach().clone() for param in engine.parameters()]


@pytest.mark.parametrize("settings", [{}, {"bf16": {"enabled": True}}], ids=str)
def test_without_zero_the_engine_trains_saves_and_loads(settings, tmp_path):
    engine = engine_of(gradient_clipping=1.0, **settings)
    before = copy_of(engine)
    train(engine, range(2))
    assert not any(torch.equal(a, b) for a, b in zip(engine.parameters(), before, strict=True))
    engine.save_checkpoint(tmp_path)
    train(engine, range(2, 4))
    expected = copy_of(engine)
    engine = engine_of(gradient_clipping=1.0, **settings)
    engine.load_checkpoint(tmp_path)
    train(engine, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(engine.parameters(), expected, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_at_the_first_step(stage, dtype):
    settings = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    engine = engine_of(zero_optimization={"stage": stage}, **settings)
    with pytest.raises(TypeError, match=rf"'0\.weight' had shape \(8, 8\).*ZeRO-{stage}"):
        train(engine, range(1))
