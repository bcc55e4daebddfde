"""In-context examples: the calibration questions nearest to a question, by TF-IDF (Salton and Buckley, 1988)."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.data.forms import Item
from pipeline.data.prompts import Turn

_WORD = re.compile(r"\w+")


class Tfidf:
    """TF-IDF vectors of documents.

    A word that is in ``df`` of the ``n`` documents weighs its count times ``log((1 + n) / (1 + df)) + 1``; vectors
    have length 1, so that a scalar product is a cosine. Words are runs of letters and digits, case folded.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in documents]
        vocabulary = sorted({word for count in counts for word in count})
        self.index = {word: number for number, word in enumerate(vocabulary)}
        frequency = np.array([sum(word in count for count in counts) for word in vocabulary], dtype=np.float64)
        self.weight = np.log((1 + len(documents)) / (1 + frequency)) + 1
        self.vectors = np.stack([self._vector(count) for count in counts]) if counts else np.zeros((0, 0))

    def similarity(self, text: str) -> np.ndarray:
        """Cosine with every document, float64 ``[n]``; 0 throughout for a text without a known word."""
        return self.vectors @ self._vector(Counter(words(text)))

    def nearest(self, text: str, count: int) -> list[int]:
        """The ``count`` most similar documents, the most similar first; equals in the documents' order."""
        return [int(i) for i in np.argsort(-self.similarity(text), kind="stable")[:count]]

    def _vector(self, counts: Counter[str]) -> np.ndarray:
        vector = np.zeros(len(self.index))
        for word, number in counts.items():
            if word in self.index:
                vector[self.index[word]] = number * self.weight[self.index[word]]
        length = np.linalg.norm(vector)
        return vector / length if length else vector


def words(text: str) -> list[str]:
    """The words of a text, case folded, in order."""
    return _WORD.findall(text.casefold())


class Examples:
    """For any question, the ``shots`` nearest items as turns of a chat, the nearest last.

    The assistant's turn is the item's first answer, that of the persona from whose side the items are seen.
    """

    def __init__(self, items: Sequence[Item], shots: int) -> None:
        self.items, self.shots = items, shots
        self.index = Tfidf([item.question for item in items])

    def __call__(self, question: str) -> list[Turn]:
        chosen = [self.items[i] for i in reversed(self.index.nearest(question, self.shots))]
        return [(item.question, item.matching) for item in chosen]
