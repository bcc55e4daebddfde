"""Fixtures of the data tests: files to load and tiny tokenizers with and without a chat template."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What do you do on a free evening? I read a long book alone.",
    "Question: How do you travel? Answer: with friends and much noise.",
    "user system assistant end You are a quiet person. Yes, I would. No, never.",
] * 4
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SILENT = (
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"plain": None, "chat": CHATML, "no-system": NO_SYSTEM, "silent": SILENT}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """Write bytes, text, or (for a list) one JSON object a line; returns the path."""

    def save(name: str, content: bytes | str | list[Mapping[str, Any]]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return save


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Byte-level BPE by the template it has; "bos" begins every sequence with <s>, "bos-chat" its template too."""
    return {name: _tokenizer(template, bos=False) for name, template in TEMPLATES.items()} | {
        "bos": _tokenizer(None, bos=True),
        "bos-chat": _tokenizer("<s>" + CHATML, bos=True),
    }


def _tokenizer(template: str | None, *, bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>", pad_token="<s>")
    wrapped.chat_template = template
    return wrapped
