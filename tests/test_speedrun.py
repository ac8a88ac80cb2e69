"""The script for modded-nanogpt's optimization track: its shards, its model, its rule, our step."""

import copy
import math
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

FOLDER = Path(__file__).parents[1] / "benchmarks" / "speedrun"
sys.path.insert(0, str(FOLDER))

import speedrun  # noqa: E402
from token_shards import ShardError, TokenShards, open_shard  # noqa: E402
from track_model import GPT, Size  # noqa: E402
from track_recipes import RECIPES  # noqa: E402

import sinkgd  # noqa: E402

ALONE = speedrun.Ranks(0, 1, torch.device("cpu"))
STEPS = 40
TRAINING = ["--tiny", "--steps", str(STEPS), "--recipe", "sinkgd"]


def write_shard(path, tokens, *, magic=20240520, version=1, count=None):
    """Write a shard as the header of its layout says, by struct alone."""
    header = (magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


def learnable(count, seed):
    """Write a text in which each token has four successors: its loss can fall to ln 4."""
    successors = np.random.default_rng(0).integers(0, 256, (256, 4))
    tokens = [0]
    for choice in np.random.default_rng(seed).integers(0, 4, count - 1):
        tokens.append(int(successors[tokens[-1], choice]))
    return tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fineweb10B")
    for index in (1, 2):
        write_shard(folder / f"fineweb_train_{index:06d}.bin", learnable(12_500, index))
    write_shard(folder / "fineweb_val_000000.bin", learnable(2_500, 0))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return the losses of a tiny run in this process, and its log."""
    logs = tmp_path_factory.mktemp("logs")
    (losses,) = speedrun.main([*TRAINING, "--data", str(data), "--out", str(logs)])
    (log,) = logs.iterdir()
    return losses, log.read_text(encoding="utf-8")


def test_a_shard_is_a_header_of_256_int32_and_uint16_tokens(tmp_path):
    path = write_shard(tmp_path / "shard.bin", [0, 1, 255, 256, 50303, 65535])
    assert open_shard(path).tolist() == [0, 1, 255, 256, 50303, 65535]
    written = path.read_bytes()
    assert written[:12] == b"\x88\xd8\x34\x01" + b"\x01\0\0\0" + b"\x06\0\0\0"
    assert written[1024:] == open_shard(path).tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_batches_follow_each_other_and_skip_the_rest_of_a_shard(tmp_path, ranks):
    # The last batch of a shard needs two tokens beyond its inputs: 17 give one batch of 8, 18 two.
    counts, batch, row = (17, 18, 10), 8, 2
    tokens = iter(range(1000))
    shards = [[next(tokens) for _ in range(count)] for count in counts]
    for index, shard in enumerate(shards):
        write_shard(tmp_path / f"fineweb_train_{index:06d}.bin", shard)
    begins = [(0, 0), (1, 0), (1, 8), (2, 0)]

    read = TokenShards(tmp_path, "train", 1000)
    parts = [list(read.batches(batch, row, rank, ranks)) for rank in range(ranks)]

    for index, (shard, begin) in enumerate(begins):
        inputs = torch.cat([part[index][0].flatten() for part in parts]).tolist()
        targets = torch.cat([part[index][1].flatten() for part in parts]).tolist()
        assert inputs == shards[shard][begin : begin + 8]
        assert targets == shards[shard][begin + 1 : begin + 9]
    assert [len(part) for part in parts] == [len(begins)] * ranks
    assert parts[0][0][0].shape == (batch // row // ranks, row)
    read.check(batch, len(begins))
    with pytest.raises(ShardError, match="hold 4 batches of 8 tokens, and the run needs 5"):
        read.check(batch, len(begins) + 1)


@pytest.mark.parametrize(
    ("tokens", "header", "message"),
    [
        ([1, 2], {"magic": 20240801}, "begins with 20240801, not with 20240520"),
        ([1, 2], {"version": 2}, "has version 2 of the layout, not 1"),
        ([1, 2], {"count": 3}, "announces 3 tokens, which take 1030 bytes .* and has 1028"),
        ([1, 2], {"count": 1}, "announces 1 tokens, which take 1026 bytes .* and has 1028"),
        ([], {}, "holds no token"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path, tokens, header, message):
    path = write_shard(tmp_path / "fineweb_train_000001.bin", tokens, **header)
    with pytest.raises(ShardError, match=f"fineweb_train_000001.bin {message}.*download it again"):
        TokenShards(tmp_path, "train", 256)
    path.write_bytes(b"\0" * 1000)
    with pytest.raises(ShardError, match="has 1000 bytes, less than its header of 1024"):
        open_shard(path)


def test_missing_and_short_shards_and_unknown_tokens_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"holds no fineweb_train_\*.bin; run data/cached_fine"):
        TokenShards(tmp_path, "train", 256)
    write_shard(tmp_path / "fineweb_train_000001.bin", [300] + [7] * 8)
    shards = TokenShards(tmp_path, "train", 256)
    with pytest.raises(ShardError, match=r"000001.bin holds 9 tokens; a batch needs 10"):
        shards.check(8, 1)
    with pytest.raises(ShardError, match="holds the token 300, and the vocabulary has 256"):
        list(shards.batches(4, 2))


def test_the_model_has_the_track_s_parameters():
    with torch.device("meta"):
        model = GPT(Size())
    d, vocabulary, layers = 768, 50304, 12
    block = 12 * d * d + 9 * d + 2 * d  # matrices, their biases, gains
    outside = 2 * vocabulary * d + vocabulary + 2 * d
    assert sum(p.numel() for p in model.parameters()) == layers * block + outside == 162_354_816
    (matrices, *others) = sinkgd_groups(model)
    assert matrices["algorithm"] == "sinkgd"
    assert sorted(tuple(p.shape) for _, p in matrices["params"]) == sorted(
        [(d, d)] * 4 * layers + [(4 * d, d)] * layers + [(d, 4 * d)] * layers
    )
    trained = {group["lr"]: [name for name, _ in group["params"]] for group in others}
    assert trained[0.7] == ["embed.weight"]
    assert trained[0.004] == ["head.weight"]
    assert len(trained[0.015]) == 6 * layers + 2 * layers + 3
    assert {group["algorithm"] for group in others} == {"adamw"}


def sinkgd_groups(model, **options):
    """Return the groups of the script, written out."""
    adamw = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.001}
    return sinkgd.param_groups(
        model,
        lr=0.001,
        matrix_lr_scale=1.0,
        overrides={
            "^embed.weight": {"lr": 0.7, **adamw},
            "^head.weight": {"lr": 0.004, **adamw},
            "bias|norm": {"lr": 0.015, **adamw},
        },
        **options,
    )


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("sinkgd", {"weight_decay": 0.1}), ("sinkgd-paper", {"deflated_rank": 0})],
)
def test_a_step_is_sinkgd_s_own_bit_for_bit(recipe, options):
    model = _random_model()
    own = copy.deepcopy(model)
    decay = options.get("weight_decay", 0.0)
    optimizers = RECIPES[recipe].optimizers(model, 0.001, decay)
    reference = sinkgd.SinkGD(sinkgd_groups(own, **options))
    for seed in range(3):
        tokens = torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(seed))
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        speedrun.train_step(model, optimizers, (inputs, targets), 4, ALONE)
        for half in (slice(0, 4), slice(4, 8)):
            own(inputs[half], targets[half]).backward()
        reference.step()
        reference.zero_grad()
        for (name, found), expected in zip(model.named_parameters(), own.parameters(), strict=True):
            assert torch.equal(found, expected), name
    assert not torch.equal(model.blocks[0].mlp.up.weight, _random_model().blocks[0].mlp.up.weight)


def test_muon_makes_all_singular_values_equal_and_adamw_s_first_step_is_a_sign():
    for recipe in ("muon", "adamw"):
        model = _random_model()
        before = copy.deepcopy(model)
        tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
        batch = (tokens[:, :-1], tokens[:, 1:].contiguous())
        optimizers = RECIPES[recipe].optimizers(model, 0.01, 0.0)
        speedrun.train_step(model, optimizers, batch, 4, ALONE)
        moved = before.blocks[0].mlp.up.weight - model.blocks[0].mlp.up.weight
        sizes = torch.linalg.svdvals(moved / 0.01) if recipe == "muon" else (moved / 0.01).abs()
        side = 2.0 if recipe == "muon" else 1.0  # √(rows / columns) of a 256 × 64 matrix
        assert_close(sizes, torch.full_like(sizes, side), rtol=0.05, atol=0)


def _random_model():
    """Return a tiny model without zeros, so that every gradient differs from zero."""
    model = GPT(speedrun.TINY.model)
    model.reset(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))
    return model


def test_rates_rise_stay_and_fall_to_zero():
    recipe = speedrun.replace(RECIPES["sinkgd"], steps=1000, warmup=0.1)
    factors = [speedrun.lr_factor(step, recipe) for step in (0, 49, 99, 299, 300, 650, 999)]
    assert factors == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 1 / 700])
    assert speedrun.lr_factor(0, RECIPES["muon"]) == 1


@pytest.mark.parametrize(
    ("losses", "passes"),
    [([3.2759], True), ([3.2777], False), ([3.2779] * 4, True), ([3.2787] * 10, True)],
)
def test_the_rule_takes_the_mean_and_the_number_of_runs(losses, passes):
    # The examples of the track: a single run needs 3.276, four 3.278; its results 1 and 36.
    trials = [{0: 10.8, 3250: loss} for loss in losses]
    assert speedrun.first_passing_step(trials) == (3250 if passes else None)


def test_a_tiny_run_learns(trained):
    losses, _ = trained
    assert losses[0] == pytest.approx(math.log(256), abs=1e-4)  # the head begins at zero
    assert math.log(4) < losses[STEPS] < 3.5


def test_the_log_holds_the_losses(trained):
    losses, log = trained
    line = r"^step:(\d+)/40 val_loss:([\d.]+) train_time:[\d.]+s step_avg:[\d.]+ms$"
    assert dict(re.findall(line, log, re.MULTILINE)) == {
        str(step): f"{loss:.5f}" for step, loss in losses.items()
    }


def test_the_log_begins_with_a_program_of_the_same_files_and_arguments(trained, monkeypatch):
    program, separator, _ = trained[1].partition("=" * 100 + "\n")
    assert separator
    started = []

    def start(path, run_name):
        root = Path(path).parent
        files = {file.relative_to(root): file.read_bytes() for file in root.rglob("*.py")}
        started.append((Path(path).name, run_name, files))

    monkeypatch.setattr(runpy, "run_path", start)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["program.py", "--data", "elsewhere"])
    exec(compile(program, "program.py", "exec"), {})
    ((name, run_name, files),) = started
    assert (name, run_name) == ("speedrun.py", "__main__")
    assert sys.argv == [
        *("program.py", "--recipe=sinkgd", f"--steps={STEPS}", "--matrix-lr=0.001"),
        *("--matrix-decay=0.0", "--trials=1", "--seed=0", "--tiny", "--data", "elsewhere"),
    ]
    library = Path(sinkgd.__file__).parent
    for file, text in files.items():
        source = library.parent / file if file.parts[0] == "sinkgd" else FOLDER / file
        assert text == source.read_bytes()
    assert {file.name for file in FOLDER.glob("*.py")} <= {str(file) for file in files}
    assert len(files) > 50


@pytest.mark.slow
def test_that_program_needs_no_library_and_repeats_the_run(data, tmp_path):
    # AdamW: SinkGD's loops would compile again, for a new folder.
    options = ["--tiny", "--steps", "3", "--recipe", "adamw", "--data", str(data), "--trials", "2"]
    first, second = speedrun.main([*options, "--out", str(tmp_path / "logs")])
    assert first != second  # other weights
    (log,) = (tmp_path / "logs").iterdir()
    program, _, lines = log.read_text(encoding="utf-8").partition("=" * 100 + "\n")
    ripped = tmp_path / "ripped.py"
    ripped.write_text(f"{program}\nprint(sys.modules['sinkgd'].__file__, folder)\n")
    *again, origin = subprocess.run(
        [sys.executable, ripped, "--data", data, "--out", tmp_path / "logs"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    ).stdout.splitlines()
    file, folder = origin.split()
    assert Path(file) == Path(folder) / "sinkgd/__init__.py"
    pattern = r"step:(\d+)/3 val_loss:([\d.]+)"
    assert re.findall(pattern, "\n".join(again)) == re.findall(pattern, lines) != []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_the_model_compiles_to_one_graph():
    model = _random_model()
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:].contiguous()
    expected = model(*batch)
    model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    assert_close(model(*batch), expected)


@pytest.mark.slow
def test_two_ranks_train_as_one(trained, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(FOLDER / "speedrun.py"), *TRAINING]
    found = subprocess.run(
        [*command, "--data", str(data), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    printed = found.stdout
    losses = dict(re.findall(r"step:(\d+)/40 val_loss:([\d.]+)", printed))
    assert "2 × CPU" in printed
    for step, loss in trained[0].items():
        # Sums in another order, of which the embedding's are bfloat16.
        assert float(losses[str(step)]) == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--trials", "-1"], "--trials must be at least 1, got -1"),
        (["--matrix-lr", "nan"], "--matrix-lr must be finite and at least 0, got nan"),
        (["--matrix-decay", "-0.1"], "--matrix-decay must be finite and at least 0, got -0.1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        speedrun.main(["--tiny", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("page", ["docs/experiments.md", "benchmarks/README.md"])
def test_the_documented_command_is_read(page, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = (FOLDER.parents[1] / page).read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^.*benchmarks/speedrun/speedrun.py ([^`\n]*)", text, re.MULTILINE)
    given = speedrun.parsed(arguments.split())
    assert (given.recipe, given.tiny) == ("sinkgd", False)
    assert given.data == Path("modded-nanogpt/data/fineweb10B")


def test_the_track_is_not_trained_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speedrun.main([])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_ranks_that_cannot_share_a_batch_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="8 forward passes, which 3 processes cannot share"):
        speedrun.joined(speedrun.TRACK)


def test_short_shards_end_the_run_before_its_first_step(data, tmp_path):
    with pytest.raises(SystemExit, match="hold 48 batches of 512 tokens, and the run needs 49"):
        speedrun.main(["--tiny", "--steps", "49", "--data", str(data), "--out", str(tmp_path)])
