"""No few words tell the poles of a shipped set apart: a naive-Bayes bag of words written here."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest

from pipeline.data.catalogue import DICHOTOMIES, shipped_set
from pipeline.data.forms import Item

FEW, LIMIT = 3, 0.65


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower().replace("’", "'")))


class BagOfWords:
    """Document frequencies of the two poles, with add-one smoothing."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.matching = Counter(w for i in items for w in words(i.matching))
        self.other = Counter(w for i in items for w in words(i.other or ""))
        self.odds = {
            w: math.log((self.matching[w] + 1) / (self.other[w] + 1)) for w in sorted(self.matching | self.other)
        }

    def one_sided(self, count: int) -> list[str]:
        """The words whose counts differ most between the poles; ties in alphabetical order."""
        return sorted(self.odds, key=lambda w: (-abs(self.matching[w] - self.other[w]), w))[:count]

    def accuracy(self, items: Iterable[Item], vocabulary: Iterable[str]) -> float:
        """Two-way choice between the two answers of an item; a tie is half right."""
        known, points = set(vocabulary), []
        for item in items:
            margin = self._score(item.matching, known) - self._score(item.other or "", known)
            points.append(0.5 if abs(margin) < 1e-9 else float(margin > 0))
        return sum(points) / len(points)

    def _score(self, text: str, known: set[str]) -> float:
        return sum(self.odds[w] for w in sorted(words(text) & known & self.odds.keys()))


def leave_one_topic_out(items: Sequence[Item], count: int) -> float:
    """Accuracy on every topic by the ``count`` most one-sided words of the other topics, over all items."""
    right = 0.0
    for topic in sorted({i.topic for i in items}):
        model = BagOfWords([i for i in items if i.topic != topic])
        held = [i for i in items if i.topic == topic]
        right += len(held) * model.accuracy(held, model.one_sided(count))
    return right / len(items)


def item(matching: str, other: str, topic: str = "") -> Item:
    return Item("q", matching, other, "pair", topic=topic)


def test_the_classifier_finds_a_shortcut_where_there_is_one():
    train = [item(f"quiet thing {i}", f"loud thing {i}") for i in "abcdef"]
    model = BagOfWords(train)
    assert set(model.one_sided(2)) == {"quiet", "loud"}
    held = [item("a quiet place", "a noisy place"), item("nothing", "so loud"), item("same", "unseen")]
    assert model.accuracy(held, model.one_sided(2)) == pytest.approx(2.5 / 3)
    assert model.accuracy([i.swapped() for i in held], model.odds) == pytest.approx(0.5 / 3)


def test_leaving_topics_out_forgets_words_of_one_topic():
    """A word that gives away one topic only is worth nothing there; one that all topics share is."""
    own = [item(f"{t} {t}plus", f"{t} {t}minus", t) for t in ("sea", "sky", "sun") for _ in range(3)]
    assert leave_one_topic_out(own, 2) == 0.5
    shared = [item(f"{t} always", f"{t} never", t) for t in ("sea", "sky", "sun") for _ in range(3)]
    assert leave_one_topic_out(shared, 2) == 1.0


@pytest.mark.parametrize("name", DICHOTOMIES)
def test_three_words_do_not_tell_the_poles_apart(name):
    personas = shipped_set(name)
    calibration, held = personas.split("calibration"), personas.split("test")
    model = BagOfWords(calibration)
    few = model.one_sided(FEW)
    counts = ", ".join(f"{w} {model.matching[w]}:{model.other[w]}" for w in few)
    accuracy = model.accuracy(held, few)
    topics = leave_one_topic_out(calibration, FEW)
    print(
        f"{name}: bag of words, held-out half: all words {model.accuracy(held, model.odds):.3f}, {FEW} words "
        f"{accuracy:.3f} ({counts}); one topic left out of the calibration half: {FEW} words {topics:.3f}, all words "
        f"{leave_one_topic_out(calibration, 10**6):.3f}"
    )
    assert accuracy <= LIMIT, f"the words {counts} give the poles away"
    assert topics <= LIMIT
