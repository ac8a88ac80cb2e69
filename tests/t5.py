"""A small tokenizer of T5's kind, and what GaLore's benchmark makes of documents with it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import T5TokenizerFast

PAD, EOS = 0, 1
SENTINELS = 100
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,/"
WORDS = ("▁the", "▁of", "▁state", "ing", "tion", "▁a")
# pads, end, unknown, then a space, letters and words: 49 pieces, each of which may occur
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
PIECES += [(piece, -5.0 - i / 100) for i, piece in enumerate(LETTERS)]
PIECES += [(piece, -3.0 - i / 100) for i, piece in enumerate(WORDS)]


def make_t5(folder: Path, max_length: int) -> T5TokenizerFast:
    """Save a tokenizer with T5's layout of ids in ``folder``, the sentinels last."""
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    tokenizer = T5TokenizerFast(vocab=PIECES + sentinels, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def galore_batch(tokenizer: T5TokenizerFast, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, attention mask and labels ``(b, t)`` as `torchrun_main.py` makes them."""
    rows = [
        tokenizer(
            text,
            max_length=tokenizer.model_max_length,
            truncation=True,
            padding="max_length",
            return_tensors="pt",
        )
        for text in texts
    ]
    inputs = torch.cat([row["input_ids"] for row in rows])
    mask = torch.cat([row["attention_mask"] for row in rows])
    labels = inputs.clone()
    labels[labels == PAD] = -100
    return inputs, mask, labels
