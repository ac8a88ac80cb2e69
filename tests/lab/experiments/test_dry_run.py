"""Every study can be built, at both scales."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from lab.experiments.conftest import small_plan
from lab.models.test_huggingface import LLAMA_3_2_1B, LLAMA_3_8B
from sinkgd.lab.cli import main
from sinkgd.lab.commands.experiment import Experiment
from sinkgd.lab.data import Manifest
from sinkgd.lab.experiments.arms import Arm
from sinkgd.lab.experiments.dry_run import dry_run, dry_run_table
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.studies.settings import paper
from sinkgd.lab.models import build_model
from sinkgd.lab.train.config import SharedConfig, load_config

BENCHMARK_FILES = Path(__file__).parents[3] / "benchmarks" / "c4"

# Those at machine scale are run; two of them stand for all.
BUILT = [
    *(("lens", scale) for scale in ("machine", "paper")),
    *(("alpha", "paper"), ("iterations", "machine")),
    *(
        pytest.param(name, "paper", marks=pytest.mark.slow)
        for name in STUDIES
        if name not in ("lens", "alpha", "finetune")  # finetune needs a checkpoint
    ),
]
# As published: GPT-2 large, and Llama 2 7B.
GPT2_LARGE = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1280,
    "n_head": 20,
    "n_layer": 36,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(("study", "scale"), BUILT)
def test_every_study_is_built_without_training(capsys, monkeypatch, tmp_path, study, scale):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", study, "--scale", scale, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for arm in STUDIES[study].settings[scale].arms:
        assert arm.name in shown
    if scale == "paper" and study == "alpha":
        assert "58.1M" in shown  # llama-60m as published
        assert "1.31B" in shown  # 10,000 steps of 131,072 tokens


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (GPT2_LARGE, "774M"),
        (LLAMA_2_7B, "6.74B"),
        (LLAMA_3_2_1B, "1.24B"),
        pytest.param(LLAMA_3_8B, "8.03B", marks=pytest.mark.slow),
    ],
    ids=["gpt2", "llama 2", "llama 3.2", "llama 3"],
)
def test_a_checkpoint_is_built_from_its_config_alone(capsys, tmp_path, fields, parameters):
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    options = ["--scale", "paper", "--model.weights", str(tmp_path), "--dry-run"]
    assert main(["experiment", "finetune", *options]) == 0
    shown = capsys.readouterr().out
    for arm in STUDIES["finetune"].settings["paper"].arms:
        line = next(line for line in shown.splitlines() if line.split()[:1] == [arm.name])
        assert (parameters in line) is not arm.name.startswith("lora-")


def test_fine_tuning_at_paper_scale_asks_for_a_checkpoint(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", "finetune", "--scale", "paper", "--dry-run"]) == 2
    words = "model.weights is 'checkpoint', which holds no run"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"damaged\n", "study.jsonl:1 is not a record"),
        (b'{"kind":"odd"}\n{"kind":', "study.jsonl:1 is not a record"),
        (b"\xff\n", "study.jsonl is not UTF-8 text"),
        (None, "Is a directory"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_fails_where_the_study_would(capsys, tmp_path, content, message, dry):
    path = tmp_path / "study.jsonl"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    options = ["--scale", "paper", "--out", str(tmp_path), *(["--dry-run"] if dry else [])]
    assert main(["experiment", "iterations", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "arm" not in captured.out


def test_without_a_name_every_study_is_listed_with_its_question(capsys):
    assert main(["experiment"]) == 0
    shown = capsys.readouterr().out
    for name, study in STUDIES.items():
        assert f"  {name}" in shown
        assert study.question in shown


def test_an_error_is_one_line(capsys):
    assert main(["experiment", "iteratons"]) == 2
    assert "did you mean 'iterations'" in capsys.readouterr().err
    assert main(["experiment", "iterations", "--alpha", "0.1"]) == 2
    assert "its axis is --iterations" in capsys.readouterr().err
    assert main(["experiment", "iterations", "--report", "--out", "/nowhere"]) == 2
    assert "no study at /nowhere/study.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["iterations", "--scale", "paper"],
        ["--scale", "paper", "iterations"],
        ["--no-tune", "iterations", "--scale", "paper", "--out", "alpha"],
        ["--out", "alpha", "iterations", "--scale", "paper"],
    ],
)
def test_the_studys_own_values_are_the_defaults_wherever_its_name_stands(arguments):
    assert Experiment.defaults(arguments).shared == paper("llama-130m")


@pytest.mark.parametrize("preset", ["llama-60m", "llama-130m", "llama-350m", "llama-1b"])
def test_the_papers_scale_is_the_benchmark_for_each_of_its_models(preset):
    """The studies and ``sinkgd train`` with the benchmark's own files run the same."""
    arguments = ["table1", "--scale", "paper", "--model.preset", preset]
    shared = Experiment.defaults(arguments).shared
    written = load_config(BENCHMARK_FILES / f"{preset}.toml", SharedConfig)
    for table in ("model", "data", "training", "mesh", "evaluation"):
        assert getattr(shared, table) == getattr(written, table)


@pytest.mark.parametrize(
    "options", [[], ["--scale", "paper", "--model.preset", "llama-350m"], ["--no-reuse"]]
)
def test_the_command_on_the_page_repeats_the_study(options):
    given = tyro.cli(
        Experiment, args=["batch", *options], default=Experiment.defaults(["batch", *options])
    )
    given = replace(given, seeds=4, lr="0.01", tune=False)
    training = replace(given.shared.training, device="auto", threads=2)
    given = replace(given, shared=replace(given.shared, training=training))
    words = given._command().split()
    assert words[:3] == ["sinkgd", "experiment", "batch"]
    again = tyro.cli(Experiment, args=words[2:], default=Experiment.defaults(words[2:]))
    assert again == given


@pytest.mark.parametrize("recipe", ["sinkgd", "rows-only"])
def test_a_dash_for_an_unknown_memory_is_explained_where_it_occurs(shards, recipe):
    arm = Arm("one", {"optimizer.recipe": recipe})
    table = dry_run_table(small_plan(shards, arms=(arm,), tune=False))
    ((*_, memory),) = table.rows
    words = "A dash (–) in the column memory means that it has no estimate for the arm."
    assert (memory == "–") == (recipe == "rows-only")
    assert (words in table.note) == (recipe == "rows-only")


def test_models_have_the_vocabulary_of_the_given_shards(shards):
    plan = small_plan(shards)
    vocab_size = Manifest.read(shards).vocab_size
    for arm in dry_run(plan):
        model = build_model("llama-nano", vocab_size=vocab_size)
        assert arm.parameters == sum(p.numel() for p in model.parameters())


def test_shards_that_are_not_there_yet_leave_the_vocabulary_of_the_preset(tmp_path):
    plan = small_plan(tmp_path / "absent")
    model = build_model("llama-nano")
    assert {arm.parameters for arm in dry_run(plan)} == {sum(p.numel() for p in model.parameters())}
