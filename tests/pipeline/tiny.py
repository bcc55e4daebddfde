"""A tiny random model with a tokenizer, and small persona files: what the end-to-end tests run on."""

import csv
import json
from pathlib import Path

import torch

SENTENCES = ["the quick brown fox jumps over the lazy dog. What do you do? I like it, and you don't."] * 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Save a random two-layer model of ``family`` ("llama", "gpt2" or "bert") and its tokenizer."""
    from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaConfig

    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(seed)
    if family == "bert":
        model = BertModel(
            BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        )
    elif family == "gpt2":
        model = AutoModelForCausalLM.from_config(GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=256))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "max_position_embeddings": 256}
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**ids, **shape, num_attention_heads=4, num_key_value_heads=2)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_pairs(path: Path, count: int = 10) -> Path:
    """A CSV in pair form; answers of different lengths."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "matching", "not_matching"])
        for i in range(count):
            writer.writerow(
                [f"What do you do on day {i}?", f"I jump over dog {i}" + " and more" * (i % 3), f"The fox is lazy {i}"]
            )
    return path


def write_texts(path: Path) -> Path:
    """JSON Lines of plain texts for two personas."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(4):
            for persona in ("pirate", "butler"):
                file.write(json.dumps({"persona": persona, "text": f"{persona} number {i} likes the dog"}) + "\n")
    return path


def repeating(patch) -> None:
    """What a model repeats under a mask counts, though this one repeats itself without a mask too."""
    from pipeline.repetitions import Writer

    patch.setattr(Writer, "_share", lambda *_: 0.1)
