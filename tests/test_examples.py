"""The examples run: they fine-tune, stop, resume, and keep less state than AdamW."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SHARED = "small_gpt2"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != SHARED)
PACKAGES = {
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "lightning_module": "lightning",
    "torch_loop": "transformers",
    "trl_sft": "trl",
}
TINY = {
    "--adamw-lr": 1e-2,
    "--steps": 12,
    "--pretraining-steps": 10,
    "--batch": 4,
    "--length": 16,
    "--width": 32,
    "--layers": 2,
    "--vocabulary": 300,
}
# Its first half and its second share few letters, so that there is something to learn in either.
TEXT = "abc bca cab acb bac cba " * 200 + "xyz yzx zxy xzy yxz zyx " * 200


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the ``main`` of an example on a text of a few letters."""
    monkeypatch.syspath_prepend(FOLDER)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    arguments = [str(part) for option in TINY.items() for part in option]

    def run(name, *others):
        module = importlib.import_module(name)
        given = [*arguments, "--text", str(text), "--out", str(tmp_path / "runs")]
        return module.main([*given, *others])

    yield run
    for name in (*NAMES, SHARED):
        sys.modules.pop(name, None)
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


def test_every_example_is_known_and_linked():
    assert [*PACKAGES] == NAMES
    for page in ("examples/README.md", "docs/trainers.md"):
        text = (FOLDER.parent / page).read_text(encoding="utf-8")
        assert [name for name in NAMES if f"{name}.py" not in text] == []


@pytest.mark.filterwarnings("ignore")  # of the trainers and of what they import
@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns_resumes_and_keeps_less_state(name, run, capsys):
    pytest.importorskip(PACKAGES[name], reason="pip install '.[trainers]'")
    result = run(name)
    assert result.after[1] < result.before[1] - 0.1  # on the part that it was fine-tuned on
    assert 0 < result.state_bytes < result.adamw_bytes / 2
    said = capsys.readouterr().out
    assert "resumed from it" in said
    assert f"{result.state_bytes:,} bytes" in said
    assert f"{result.after[1]:.3f}" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_fine_tunes_a_checkpoint(name, run, tmp_path, capsys):
    pytest.importorskip(PACKAGES[name], reason="pip install '.[trainers]'")
    transformers = pytest.importorskip("transformers")
    shared = importlib.import_module(SHARED)
    tokenizer = shared.learn_tokenizer([TEXT], 300)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
    )
    folder = tmp_path / "checkpoint"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = run(name, "--checkpoint", str(folder))
    assert result.after[1] < result.before[1] - 0.1
    assert "AdamW trains" not in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_as_long_as_a_notebook_and_says_how_to_run_it(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert 60 <= text.count("\n") <= 120
    assert f"python examples/{name}.py" in ast.get_docstring(ast.parse(text))


@pytest.mark.usefixtures("run")
def test_help_teaches(capsys):
    pytest.importorskip("transformers", reason="pip install '.[trainers]'")
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("torch_loop").main(["--help"])
    said = capsys.readouterr().out
    assert "stops half way, saves" in said
    assert "the rate that AdamW would fine-tune at" in said
    assert "(0.001)" in said


@pytest.mark.usefixtures("run")
def test_a_text_that_is_too_short_is_refused_with_the_remedy(tmp_path):
    pytest.importorskip("transformers", reason="pip install '.[trainers]'")
    short = tmp_path / "short.txt"
    short.write_text("a few words", encoding="utf-8")
    module = importlib.import_module("torch_loop")
    with pytest.raises(SystemExit, match="too few; give more text"):
        module.main(["--text", str(short)])
