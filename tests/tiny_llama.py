"""A folder with a tiny LLaMA, its tokenizer and a file of texts, for trainers that read folders."""

import json

import torch

WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "plus", "is", "user", "assistant"]


def save_tiny_llama(folder):
    """Write the model and its tokenizer to ``folder``, which may be absent."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


def save_texts(file, rows=64):
    """Write rows that hold a text and the same text as a conversation."""
    row = {
        "text": "one plus two is three",
        "messages": [
            {"role": "user", "content": "one plus two is"},
            {"role": "assistant", "content": "three is one plus two"},
        ],
    }
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(rows)))
    return file
