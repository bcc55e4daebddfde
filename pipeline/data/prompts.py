"""From question and answer to token ids, and which tokens of a sequence count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernels.ops.activation_stats import COUNTED, IGNORED, SINK
from pipeline.errors import UserError

TOKENS = ("predicting", "answer", "prompt", "all")
"""Which positions count, see ``roles``."""


_MARK = "\u2063question\u2063"
"""Stands in for the question when its place in a template is looked for."""


Turn = tuple[str, str]
"""A question and its answer, earlier in a chat."""


@dataclass(frozen=True)
class Encoded:
    """One sequence. The answer is ``ids[answer:]``, the question's own words are ``ids[question]``."""

    ids: tuple[int, ...]
    answer: int
    question: range

    def __len__(self) -> int:
        return len(self.ids)


class Prompter:
    """Renders questions with the tokenizer's chat template, or as "Question: ... Answer:" without one.

    Without a system prompt the template's own default stays. Raises UserError for a tokenizer that
    cannot tell which characters a token covers.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{type(tokenizer).__name__}: a fast tokenizer is needed (token offsets)")
        self.tokenizer = tokenizer
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    def prompt(self, question: str, system: str | None = None, earlier: Sequence[Turn] = ()) -> str:
        """The text up to where the answer begins, after the ``earlier`` turns of the chat."""
        if not question and not system:
            return ""
        if not self.chat:
            turns = [f"Question: {asked}\nAnswer: {told}" for asked, told in earlier]
            return "\n".join(filter(None, (system, *turns, f"Question: {question}", "Answer:")))
        messages = [{"role": "user", "content": question}]
        for asked, told in reversed(earlier):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}, *messages]
        if system:
            messages = self.with_system(system, messages)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, question: str, answer: str, system: str | None = None, earlier: Sequence[Turn] = ()) -> Encoded:
        """Tokenize prompt and answer as one text, so that tokens at the border are what generation sees.

        A token that reaches into the answer belongs to it.
        """
        prompt = self.prompt(question, system, earlier)
        text = prompt + (answer if self.chat or not prompt else " " + answer)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not (self.chat and prompt))
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        found = self._slot(question, system, earlier)
        end = found + len(question)
        inside = [i for i, (a, b) in enumerate(offsets) if b > a and b > found and a < end]
        return Encoded(tuple(ids), start, range(inside[0], inside[-1] + 1) if question and inside else range(0))

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def _slot(self, question: str, system: str | None, earlier: Sequence[Turn]) -> int:
        """Where the question begins in its prompt: the frame may hold the same words, so look with a mark instead."""
        return self.prompt(_MARK, system, earlier).find(_MARK) if question else 0

    def with_system(self, system: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages under a system prompt; in front of the first one where the template knows no such role."""
        whole = [{"role": "system", "content": system}, *messages]
        try:
            rendered = self.tokenizer.apply_chat_template(whole, tokenize=False)
        except Exception:  # templates raise what they like for a role they do not know
            rendered = ""
        if system in rendered:
            return whole
        first, *rest = messages
        return [first | {"content": f"{system}\n\n{first['content']}"}, *rest]


def roles(encoded: Encoded, tokens: str) -> list[int]:
    """The role of every token (``kernels.ops.activation_stats``).

    "predicting": positions that predict an answer token, from the last of the prompt to the last but
    one of the answer (for a Yes/No answer the one position that decides). "answer": the answer's own
    tokens. "prompt": the question's own words, without the template's. "all": question and answer.
    Position 0 is the attention sink in every case.
    """
    counted: set[int] = set()
    if tokens == "predicting":
        counted |= set(range(max(encoded.answer - 1, 0), len(encoded) - 1))
    if tokens in ("answer", "all"):
        counted |= set(range(encoded.answer, len(encoded)))
    if tokens in ("prompt", "all"):
        counted |= set(encoded.question)
    return [SINK if i == 0 else COUNTED if i in counted else IGNORED for i in range(len(encoded))]


def batches_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that a padded batch has at most ``budget`` tokens, longest sequences first.

    The grouping depends on the lengths alone, not on how many devices share the batches. A sequence
    longer than the budget gets a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    width = 0
    for index in order:
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches
