"""Which texts are too much alike: by ROUGE-L, of each with all before it, without comparing each with all.

Two texts of m and n words whose longest common subsequence is l are alike by 2l / (m + n). As no more words can be in
order than are common at all, texts that are more alike than the limit have so many words in common; and of two texts
with c common words, if the words of each stand in one fixed order, rarest first, the first m - c + 1 of the one and the
first n - c + 1 of the other have at least one in common (the prefix filter of Bayardo, Ma and Srikant, "Scaling up all
pairs similarity search", 2007). So only these first words are indexed and looked up, and only what they lead to is
compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

_SURE = 1e-9
"""How far above its true value the last bit of a likeness may lie."""
_GROWTH = 2
"""After how many times as many texts it is counted anew which words are rare."""


def alike(one: Sequence[str], other: Sequence[str], limit: float) -> bool:
    """Whether two texts are more similar than `limit`: twice their longest common subsequence, over the words of both
    (the F-measure of ROUGE-L).
    """
    from rapidfuzz.distance import Indel  # only where prompts are written

    return Indel.normalized_similarity(one, other, score_cutoff=limit) > limit


class Likeness:
    """Texts, each a sequence of words, against which others are held.

    Law: `near(words)` is `any(alike(words, text, limit) for text in texts)`, whatever the texts are.
    """

    def __init__(self, limit: float):
        self._limit, self._texts = limit, list[Sequence[str]]()
        self._first: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        """Numbers of the texts that have a word for the so-many-th time, where that is among their rarest."""
        self._rare: Counter[str] = Counter()
        """In how many texts a word stood when they were last counted. Law: what is in `_first` was put there by it."""
        self._due = _GROWTH

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, words: Sequence[str]) -> None:
        """One text more."""
        self._texts.append(words)
        if len(self._texts) < self._due:
            self._index(len(self._texts) - 1)
            return
        self._due = _GROWTH * len(self._texts)
        self._rare = Counter(word for text in self._texts for word in set(text))
        self._first.clear()
        for number in range(len(self._texts)):
            self._index(number)

    def near(self, words: Sequence[str]) -> bool:
        """Whether a text is more similar than the limit to one of those that were added."""
        longest, seen = self._longest(len(words)), set[int]()
        for mark in self._rarest(words):
            for number in self._first.get(mark, ()):
                if number in seen:
                    continue
                seen.add(number)
                text = self._texts[number]
                if len(text) <= longest and alike(words, text, self._limit):
                    return True
        return False

    def _index(self, number: int) -> None:
        for mark in self._rarest(self._texts[number]):
            self._first[mark].append(number)

    def _rarest(self, words: Sequence[str]) -> list[tuple[str, int]]:
        """The words among which there is one of every text that is near: each with how often it came before."""
        rare = self._rare
        marks = sorted(_counted(words), key=lambda mark: (rare[mark[0]], mark))
        # A text without words is like no other but one without words.
        return marks[: max(1, len(words) - self._common(len(words)) + 1)] or [("", 0)]

    def _common(self, count: int) -> int:
        """Fewest words that a text of so many has in common with one that is near: with the shortest there can be,
        which has nothing else.
        """
        limit = self._limit - _SURE
        shortest = int(limit * count / (2 - limit))
        return max(1, int(limit * (count + shortest) / 2))

    def _longest(self, count: int) -> float:
        """Most words of a text that is near to one of so many."""
        limit = self._limit - _SURE
        return count * (2 - limit) / limit if limit > 0 else float("inf")


def _counted(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each word with how often it came before: sets of these have as much in common as the texts have words."""
    before: Counter[str] = Counter()
    for word in words:
        yield word, before[word]
        before[word] += 1
