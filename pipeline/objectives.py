"""What is differentiated: weighted log-probabilities of answers, in units that are drawn independently.

The margin of a pair of personas is the mean over items of ``mean log p(answer of +) - mean log p(answer
of -)`` in nats per token; a unit is one item with both its answers. The likelihood of neutral text is the
mean log-probability of its answer tokens; a unit is one text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.catalogue import PersonaSet
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter


@dataclass(frozen=True)
class WeightedAnswer:
    """A sequence and the factor of its answer's summed log-probability in the objective."""

    encoded: Encoded
    weight: float

    @property
    def tokens(self) -> int:
        """Answer tokens; the first token of a text without a prompt is predicted by nothing."""
        return len(self.encoded) - max(self.encoded.answer, 1)


Unit = tuple[WeightedAnswer, ...]


def margin_units(plus: Sequence[Encoded], minus: Sequence[Encoded]) -> list[Unit]:
    """Item i is ``plus[i]`` against ``minus[i]``, each weighted ``+-1 / (items * answer tokens)``."""
    return [
        tuple(
            WeightedAnswer(answer, sign / (len(plus) * max(WeightedAnswer(answer, 1.0).tokens, 1)))
            for sign, answer in ((1.0, first), (-1.0, second))
        )
        for first, second in zip(plus, minus, strict=True)
    ]


def likelihood_units(texts: Sequence[Encoded]) -> list[Unit]:
    """Every answer token of every text weighs the same."""
    total = sum(WeightedAnswer(text, 1.0).tokens for text in texts)
    return [(WeightedAnswer(text, 1.0 / max(total, 1)),) for text in texts]


def answer_weights(units: Sequence[Unit]) -> tuple[int, float]:
    """The number of answers with tokens, and the sum of the squares of the weights of their mean log-probabilities.

    Were gradients of answers independent, with a variance each of F, the objective's would vary by the sum times F.
    """
    terms = [term for unit in units for term in unit if term.tokens]
    return len(terms), sum((term.weight * term.tokens) ** 2 for term in terms)


def objective_of(personas: PersonaSet, prompter: Prompter, *, count: int, max_length: int, seed: int) -> list[Unit]:
    """The margin of a pair, on the items that the statistics are measured on; a lone set's likelihood."""
    chosen: list[tuple[Encoded, ...]] = []
    for item in draw(personas.split("calibration"), count, seed):
        answers = (item.matching,) if item.other is None else (item.matching, item.other)
        encoded = [prompter.encode(item.question, answer) for answer in answers]
        if all(one.answer < max_length and len(one) > 1 for one in encoded):
            chosen.append(tuple(Encoded(e.ids[:max_length], e.answer, e.question) for e in encoded))
    if personas.minus is None:
        return likelihood_units([texts[0] for texts in chosen])
    return margin_units([pair[0] for pair in chosen], [pair[1] for pair in chosen])
