"""A run that begins with a Hugging Face checkpoint: what it takes over and refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as TokenizerBackend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lab.train.test_run import change, curve
from lab.train.test_starting_weights import quiet
from sinkgd.lab.cli import main
from sinkgd.lab.data import TokenDataset, open_corpus, prepare, train_tokenizer
from sinkgd.lab.results import Run
from sinkgd.lab.train.config import ConfigError, MeshConfig, OptimizerConfig, RunConfig
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.run import train
from sinkgd.lab.train.setup import set_up
from spawn import on_ranks
from stopping import stopping_at

ROWS = 288  # of the embedding, a few more than the tokenizer has
# A small Llama 3.2: grouped queries, a tied head, and scaled rotary positions.
LLAMA_3: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
}
families = pytest.mark.parametrize("family", ["gpt2", "llama", "llama3"])


def random_model(family: str, rows: int = ROWS) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": rows, "initializer_range": 0.1}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=24, **ids))
    sizes = LLAMA_3 if family == "llama3" else {"num_attention_heads": 2, "rope_theta": 500.0}
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            max_position_embeddings=24,
            **sizes,
            **ids,
        )
    )


@pytest.fixture
def checkpoint(shards: Path, tmp_path: Path):
    """Write a checkpoint whose tokenizer is that of the text."""

    def write(family: str, **options: Any) -> tuple[Path, PreTrainedModel]:
        model = random_model(family, **options)
        model.save_pretrained(tmp_path / family, max_shard_size="40KB")
        shutil.copy(shards / "tokenizer.json", tmp_path / family)
        return tmp_path / family, model.eval()

    return write


def tuned(config: RunConfig, folder: Path, **model: Any) -> RunConfig:
    config = change(config, "model", weights=str(folder), **model)
    return replace(config, optimizer=OptimizerConfig(recipe="sinkgd-finetune", lr=1e-3))


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
@families
def test_the_model_is_that_of_the_folder(config, checkpoint, family, rank):
    folder, theirs = checkpoint(family)
    model = set_up(resolve(tuned(config, folder, lora_rank=rank)), quiet).state.model
    assert model.config.vocab_size == ROWS
    # learned positions are weights and are all kept; rotary ones are made as needed
    assert model.config.max_sequence_length == (24 if family == "gpt2" else 16)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        ours, expected = model(tokens), theirs(tokens).logits
    assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_dropout_of_the_folder_is_noted(config, checkpoint):
    notes: list[str] = []
    set_up(resolve(tuned(config, checkpoint("gpt2")[0])), notes.append)
    assert "has attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1" in "".join(notes)
    notes.clear()
    set_up(resolve(tuned(config, checkpoint("llama")[0])), notes.append)
    assert not [note for note in notes if "dropout" in note]


@families
def test_a_run_goes_on_and_is_continued_without_the_folder(config, checkpoint, tmp_path, family):
    folder, _ = checkpoint(family)
    tuning = tuned(config, folder)
    train(tuning, tmp_path / "whole")
    with stopping_at(6):
        train(tuning, tmp_path / "stopped")
    shutil.rmtree(folder)
    train(tuning, tmp_path / "stopped")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    losses = [one.val_loss for one in Run.read(tmp_path / "whole" / "run.jsonl").evaluations]
    assert losses[-1] < losses[0]
    # the run is in turn the beginning of another one
    train(tuned(config, tmp_path / "whole"), tmp_path / "next")
    again = Run.read(tmp_path / "next" / "run.jsonl").evaluations
    assert again[0].val_loss == losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tp"), [("gpt2", 1), ("llama", 2), ("llama3", 1), ("llama3", 2)], ids=str
)
def test_ranks_begin_with_the_same_weights(config, checkpoint, tmp_path, family, tp):
    tuning = tuned(config, checkpoint(family)[0])
    train(tuning, tmp_path / "alone")
    on_ranks(2, train_quietly, replace(tuning, mesh=MeshConfig(tp=tp)), tmp_path / "ranks")
    alone, shared = (Run.read(tmp_path / how / "run.jsonl") for how in ("alone", "ranks"))
    for one, other in zip(alone.evaluations, shared.evaluations, strict=True):
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-4)
    # one process reads what the ranks saved
    train(tuned(config, tmp_path / "ranks"), tmp_path / "next")
    first = Run.read(tmp_path / "next" / "run.jsonl").evaluations[0]
    assert first.val_loss == pytest.approx(shared.evaluations[-1].val_loss, rel=1e-5)


def train_quietly(config: RunConfig, path: Path) -> None:
    train(config, path, echo=quiet)


def test_a_text_with_another_tokenizer_is_refused(config, checkpoint, tmp_path):
    folder, _ = checkpoint("gpt2")
    text = tmp_path / "text.txt"
    text.write_text("people and the union " * 300, encoding="utf-8")
    corpus = open_corpus([str(text)], validation_fraction=0.3)
    prepare(corpus, tmp_path / "shards", train_tokenizer(corpus, 270))
    other = change(tuned(config, folder), "data", corpus=str(tmp_path / "shards"))
    words = rf"sinkgd prepare TEXT --tokenizer {folder}/tokenizer\.json --out SHARDS"
    with pytest.raises(ConfigError, match=words):
        set_up(resolve(other), quiet)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json .* AutoTokenizer"):
        set_up(resolve(tuned(config, folder)), quiet)


def test_ids_without_a_row_are_refused(config, checkpoint, shards):
    needed = TokenDataset.open(shards).manifest.rows_needed
    folder, _ = checkpoint("llama", rows=needed - 1)
    with pytest.raises(ConfigError, match=f"has {needed - 1} rows, but .* up to {needed - 1}"):
        set_up(resolve(tuned(config, folder)), quiet)


@pytest.mark.parametrize(
    ("table", "values", "words"),
    [
        ("model", {"preset": "gpt2-nano"}, "hidden_size was 32 and is now 128"),
        ("model", {"preset": "llama-nano"}, "kind was 'GPT2Config' and is now 'LlamaConfig'"),
        ("model", {"vocab_size": 300}, "vocab_size was 288 and is now 300. Leave out"),
        ("training", {"sequence_length": 25}, "sequence_length is 25, but .* at most 24 tokens"),
    ],
)
def test_what_contradicts_the_folder_is_refused(config, checkpoint, table, values, words):
    asked = change(tuned(config, checkpoint("gpt2")[0]), table, **values)
    with pytest.raises(ConfigError, match=words):
        set_up(resolve(asked), quiet)


def test_a_folder_with_neither_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run .* and no config\.json"):
        set_up(resolve(tuned(config, tmp_path)), quiet)


def test_the_record_of_a_run_wins_over_a_config(config, checkpoint, tmp_path):
    """A folder that holds both is the run's."""
    train(config, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model_type": "odd"}))
    train(tuned(config, tmp_path / "run"), tmp_path / "second")


def write_llama_3(folder: Path, texts: list[str]) -> PreTrainedModel:
    """Save a model and a tokenizer with the parts of Llama 3.2's, both by transformers."""
    backend = TokenizerBackend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    begin, end = special[:2]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end)
    tokenizer.save_pretrained(folder)
    model = random_model("llama3").bfloat16()
    model.save_pretrained(folder)
    return model.float().eval()


def test_a_small_llama_3_is_tuned_by_the_commands_alone(tmp_path, capsys):
    texts = [f"the people of the union and the law of year {year}. " * 20 for year in range(12)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    theirs = write_llama_3(tmp_path / "llama", texts)
    shards, out = tmp_path / "shards", tmp_path / "tuned"
    own = ["--tokenizer", str(tmp_path / "llama" / "tokenizer.json"), "--out", str(shards)]
    assert main(["prepare", str(tmp_path / "texts"), *own]) == 0
    options = [
        *("--model.weights", str(tmp_path / "llama"), "--data.corpus", str(shards)),
        *("--optimizer.recipe", "sinkgd-finetune", "--optimizer.lr", "1e-3"),
        *("--training.steps", "6", "--training.batch-size", "4"),
        *("--training.sequence-length", "16", "--training.precision", "float32"),
        *("--evaluation.tokens", "256"),
    ]
    assert main(["train", "--out", str(out), *options]) == 0
    run = Run.read(out / "run.jsonl")
    assert run.start.inputs["model"]["tied_head"] is True
    assert run.start.parameters == theirs.num_parameters()
    first, last = run.evaluations[0].val_loss, run.evaluations[-1].val_loss
    assert last < first
    read = TokenDataset.open(shards).split("validation").read(0, 257)
    ids = torch.tensor(read.tolist())
    rows = torch.stack([ids[start : start + 17] for start in range(0, 256, 16)])
    with torch.no_grad():
        logits = theirs(rows[:, :-1]).logits
    expected = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert first == pytest.approx(expected, rel=1e-5)
