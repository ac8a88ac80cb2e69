"""The C4 benchmark from text to perplexity, against transformers and GaLore's own evaluator."""

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinkgd.lab.data import (
    Manifest,
    TokenDataset,
    evaluation_batches,
    load_tokenizer,
    open_corpus,
    prepare,
)
from sinkgd.lab.models import build_model
from sinkgd.lab.train.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.evaluate import evaluate
from sinkgd.lab.train.mesh import Mesh
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import set_up
from sinkgd.lab.train.training_step import loss_of
from sinkgd.lab.train.world import World
from t5 import PIECES, SENTINELS, galore_batch, make_t5

T = 12  # tokens in a row
BATCH = 4
ALONE = Mesh(torch.device("cpu"), World())
TEXTS = [
    "a",  # 1 token and the end of text
    *("the state of a" + " the" * (T + i) for i in (-6, -5, -4, -3)),  # T - 1 ... T + 2 with it
    LONG := "sailing, the motion of 1000 stations " * 20,
    "  two  spaces\nand\tlines \n",
    "☃ naïve",  # letters that the tokenizer does not know
    "url: /a/b.c",
    "the the",
    "ing " * 3,
    "of a state, of the state",
]


def write_c4(folder, train, validation):
    folder.mkdir(parents=True)
    for split, texts in (("train", train), ("validation", validation)):
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for text in texts]
        content = "\n".join(map(json.dumps, rows)).encode()
        (folder / f"c4-{split}.00000-of-01024.json.gz").write_bytes(gzip.compress(content))
    return folder


def prepared(folder, train, validation):
    theirs = make_t5(folder / "tokenizer", max_length=T)
    corpus = open_corpus([str(write_c4(folder / "c4", train, validation))])
    prepare(corpus, folder / "shards", load_tokenizer(str(folder / "tokenizer")))
    return theirs, TokenDataset.open(folder / "shards")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The tokenizer of transformers, and our shards made with its file; one text in both splits."""
    return prepared(tmp_path_factory.mktemp("benchmark"), TEXTS, TEXTS)


@pytest.fixture(scope="module")
def models():
    """Our model and that of transformers with the same weights."""
    ours = build_model("llama-nano", vocab_size=len(PIECES), max_sequence_length=T, seed=1)
    theirs = LlamaForCausalLM(LlamaConfig(**ours.config.huggingface())).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for weight in (ours.lm_head.weight, theirs.lm_head.weight):
            weight.mul_(20)  # losses far from those of a uniform guess
    return ours, theirs


def batches_of(dataset):
    options = {"sequence_length": T, "batch_size": BATCH, "packing": "none"}
    return list(evaluation_batches(dataset.split("validation"), max_tokens=10**9, **options))


def galore_batches(tokenizer):
    return [galore_batch(tokenizer, TEXTS[i : i + BATCH]) for i in range(0, len(TEXTS), BATCH)]


def test_the_texts_are_of_every_kind(benchmark):
    lengths = [len(benchmark[0](text)["input_ids"]) for text in TEXTS]
    assert {2, T - 1, T, T + 1, T + 2} <= set(lengths)
    assert max(lengths) > 10 * T


def test_rows_and_targets_are_those_of_galores_loader(benchmark):
    tokenizer, dataset = benchmark
    for batch, (inputs, mask, labels) in zip(
        batches_of(dataset), galore_batches(tokenizer), strict=True
    ):
        targets = torch.full_like(labels, -100)
        targets[:, :-1] = labels[:, 1:]
        assert batch.inputs.tolist() == inputs.tolist()
        assert batch.targets.tolist() == targets.tolist()
        assert batch.target_count == int(mask.sum()) - len(inputs)


def test_a_cut_document_ends_with_the_end_of_text_that_is_predicted(benchmark):
    _, dataset = benchmark
    inputs = torch.cat([batch.inputs for batch in batches_of(dataset)])
    targets = torch.cat([batch.targets for batch in batches_of(dataset)])
    long = TEXTS.index(LONG)
    assert inputs[long, -1] == targets[long, -2] == dataset.manifest.eos_id
    assert targets[long, -1] == -100


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_transformers(benchmark, models):
    tokenizer, dataset = benchmark
    ours, theirs = models
    for batch, (inputs, mask, labels) in zip(
        batches_of(dataset), galore_batches(tokenizer), strict=True
    ):
        expected = theirs(input_ids=inputs, attention_mask=mask, labels=labels).loss
        found = loss_of(ours, batch.inputs, batch.targets) / batch.target_count
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def galore_evaluator(model, batches, target_tokens=10_000_000):
    """GaLore's `evaluate_model` on one device: the counter of batches starts at 1."""
    total_loss, total_batches, evaluated_on_tokens = torch.tensor(0.0), 1, 0
    for inputs, mask, labels in batches:
        if evaluated_on_tokens > target_tokens:
            break
        total_batches += 1
        total_loss += model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        evaluated_on_tokens += int(mask.sum())
    return (total_loss / total_batches).item()


@torch.no_grad()
def mean_over_targets(model, batches):
    """The clean figure, token by token in float64."""
    nats, count = 0.0, 0
    for inputs, mask, labels in batches:
        logits = model(input_ids=inputs, attention_mask=mask).logits.double()
        for row in range(len(inputs)):
            for place in range(1, T):
                if labels[row, place] != -100:
                    before = logits[row, place - 1]
                    nats += float(before.logsumexp(0) - before[labels[row, place]])
                    count += 1
    return nats / count, count


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_both_evaluators_give_their_figures_at_once(benchmark, models, micro_batch_size):
    tokenizer, dataset = benchmark
    ours, theirs = models
    options = {"precision": "float32", "mesh": ALONE, "micro_batch_size": micro_batch_size}
    score = evaluate(ours, batches_of(dataset), **options)
    galore = galore_evaluator(theirs, galore_batches(tokenizer))
    clean, count = mean_over_targets(theirs, galore_batches(tokenizer))
    assert score.tokens == count
    assert score.nats_per_token == pytest.approx(clean, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(clean), rel=1e-4)
    assert score.galore_nats == pytest.approx(galore, rel=1e-5)
    assert score.galore_perplexity == pytest.approx(math.exp(galore), rel=1e-4)


def job(folder, vocab_size):
    return set_up(
        resolve(
            RunConfig(
                model=ModelConfig(vocab_size=vocab_size),
                data=DataConfig(corpus=str(folder), packing="none"),
                training=TrainingConfig(batch_size=4, sequence_length=T, threads=1),
            )
        ),
        pytest.fail,
    )


def test_a_model_may_leave_out_the_sentinels_that_no_text_has(benchmark):
    _, dataset = benchmark
    assert dataset.manifest.vocab_size == len(PIECES) + SENTINELS
    assert dataset.manifest.rows_needed <= len(PIECES)
    model = job(dataset.folder, len(PIECES)).state.model
    assert model.lm_head.weight.shape[0] == len(PIECES)
    assert job(dataset.folder, None).state.model.lm_head.weight.shape[0] == len(PIECES) + SENTINELS


def test_a_text_that_spells_a_sentinel_needs_its_row(tmp_path):
    _, dataset = prepared(tmp_path, ["a <extra_id_0> b"] * 4, ["a"])
    assert dataset.manifest.rows_needed == len(PIECES) + SENTINELS
    with pytest.raises(ConfigError, match=r"is 49, but the text has ids up to 148.* at least 149"):
        job(dataset.folder, len(PIECES))


def test_shards_of_the_format_before_say_that_they_do_not_know(benchmark, monkeypatch):
    _, dataset = benchmark
    old = replace(dataset.manifest, largest_id=None, format_version=1)
    monkeypatch.setattr(Manifest, "read", lambda folder: old)
    with pytest.raises(
        ConfigError, match="do not say which of them occur; either run `sinkgd prepare`"
    ):
        job(dataset.folder, len(PIECES))
