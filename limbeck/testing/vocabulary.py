"""A toy vocabulary, and a probability distribution over it that a test can work out for itself.

Tokens 0 to 255 are single bytes, 0 ends an answer. Then come 128 words of four letters, bare, and the same with a
space before. Ids above are fillers, for tests with a student's own, larger vocabulary. Any text can be encoded
without loss, and every word of an answer is one token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WORDS = tuple("".join(letters) for letters in product("bdklmnrs", "aeio", "tvgp", "u"))
"""128 words of four letters."""

END = 0
"""The token that ends an answer."""

_BARE, _SPACED, _FILLER = 256, 256 + len(WORDS), 256 + 2 * len(WORDS)
_WORD = re.compile(rb" ?[a-z]{4}(?![a-z])")
_PIECES = re.compile(_WORD.pattern + b"|.", re.DOTALL)


class Vocabulary:
    """A vocabulary of `size` tokens."""

    def __init__(self, size: int):
        self.size = size
        words = [word.encode() for word in WORDS]
        self.tokens = [bytes([byte]) for byte in range(256)] + words + [b" " + word for word in words]
        self.tokens += [b"<|%d|>" % number for number in range(_FILLER, size)]
        del self.tokens[size:]
        self.knows_words = size >= _FILLER
        """Whether each of the words is one token."""
        self._ids = {token: number for number, token in enumerate(self.tokens[:_FILLER])}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; `decode` gives it back."""
        ids: list[int] = []
        for piece in _PIECES.findall(text.encode()):
            known = self._ids.get(piece)
            ids.extend(piece if known is None else (known,))
        return ids

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        data, known = text.encode(), self._ids
        return len(data) - sum([len(piece) - 1 for piece in _WORD.findall(data) if piece in known])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.tokens[number] for number in ids).decode(errors="replace")

    def text(self, number: int) -> str:
        r"""One token as a string, as OpenAI shows it: bytes that are not UTF-8 as `bytes:\xe2`."""
        token = self.tokens[number]
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    def logprobs(self, context: Sequence[int]) -> np.ndarray:
        """Log-probabilities [size], in nats, of the token that follows `context`: float64, a pure function of the
        context, and different for every context.

        Words are favoured over bytes, so what is drawn from it reads as text.
        """
        return _logprobs(self.size, _digest(context))

    def draw(self, context: Sequence[int], temperature: float, seed: int) -> int:
        """The next token: the most likely one at temperature 0, else drawn by `seed`."""
        import numpy as np

        logprobs = self.logprobs(context)
        if temperature == 0:
            return int(np.argmax(logprobs))
        uniform = np.random.default_rng([seed, len(context)]).uniform(1e-12, 1, self.size)
        return int(np.argmax(logprobs / temperature - np.log(-np.log(uniform))))


def _digest(context: Sequence[int]) -> int:
    data = b"".join(number.to_bytes(4, "big") for number in context)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


@lru_cache(maxsize=4096)
def _logprobs(size: int, digest: int) -> np.ndarray:
    import numpy as np

    logits = 2 * np.random.default_rng(digest).standard_normal(size)
    logits[:_BARE] -= 6
    logits[_BARE:_SPACED] -= 3
    found = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    found.setflags(write=False)
    return found
