"""Text in, token ids out: the vocabulary that numbers tokens, and how a text falls into them.

Knows tokens; knows no files and no model.
"""

import codecs
import re
import unicodedata
from collections import Counter

import numpy as np

from lstmcore import scalars

LEVELS = ("char", "byte", "word", "whitespace")
UNKNOWN = {"char": "\ufffd", "word": " <unk>", "whitespace": "<unk>"}   # stands for a token never seen
EOS = "<eos>"           # of level "whitespace": the end of a line

# A word with the space before it, so that joining the tokens gives the text back.
WORD = re.compile(r" ?\w+(?:['’]\w+)*| ?<unk>| ?[^\w\s]+| +(?= )|\s")

ALIKE = {"‘’‚‛′´`": "'", "“”„‟«»″": '"', "‐‑‒–—―−": "-", "…": ".", "•·": "*"}

LOWER = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

def words(text):
    """A text -> its words in lower case, and single marks; blanks are left out."""
    return LOWER.findall(text.lower())


def count_chars(data):
    """How many characters a text has; of bytes, those that begin one in UTF-8."""
    if isinstance(data, str):
        return len(data)
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80))


def _alike(character):
    """Characters that look like one, the likest first."""
    plain = unicodedata.normalize("NFKD", character)[0]
    for one in plain, *(to for kinds, to in ALIKE.items() if character in kinds):
        yield from (one, one.lower()[:1], one.upper()[:1])
    if character.isspace():
        yield " "


class Vocabulary:
    """The tokens of a level and their numbers.

    Level "byte" has 256 tokens. "char", "word" and a function str -> list of tokens have token 0,
    `unknown`, for whatever is not among `tokens`, which stand in the order given. Words keep the
    space before them; those of "whitespace" are what stands between white space, and a line end is
    "<eos>", as corpora that are cut into tokens already have them.

    >>> v = Vocabulary.of("abracadabra", "char")
    >>> v.encode("cabin").tolist(), v.decode([1, 2, 5])
    ([3, 1, 2, 0, 0], 'abr')
    """

    def __init__(self, level, tokens=(), unknown=None):
        self.level = level if callable(level) else scalars.choice("level", level, LEVELS)
        unknown = unknown or UNKNOWN.get(level)
        self.tokens = list(range(256)) if level == "byte" else [unknown, *tokens]
        self.ids = {token: n for n, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ValueError("a vocabulary must not name a token twice")
        if level == "char":
            known = sorted((ord(token), n) for token, n in self.ids.items() if n)
            self._codes = np.array([code for code, _ in known], np.uint32)
            self._numbers = np.array([n for _, n in known], np.int32)

    @classmethod
    def of(cls, data, level, max_size=None, min_count=1):
        """The tokens that a text has at least min_count times, sorted; with max_size only the most
        frequent, so that there are at most so many in all.
        """
        return cls(level) if level == "byte" else cls.of_counts(
            Counter(cls(level).split(data)), level, max_size, min_count)

    @classmethod
    def of_counts(cls, counts, level, max_size=None, min_count=1):
        """The same of tokens that were counted, a dict."""
        counts = {token: count for token, count in counts.items() if token != UNKNOWN[level]}
        kept = [token for token, count in counts.items() if count >= min_count]
        if max_size is not None:
            kept = sorted(kept, key=lambda token: (-counts[token], token))[:max_size - 1]
        return cls(level, sorted(kept))

    @classmethod
    def of_many(cls, texts, level, min_count=1):
        """The tokens that texts have at least min_count times, the most frequent first.

        >>> Vocabulary.of_many(["To be, or not to be"], words).tokens
        ['<unk>', 'to', 'be', ',', 'or', 'not']
        """
        split = cls(level).split
        counts = Counter(token for text in texts for token in split(text))
        counts.pop("<unk>", None)
        return cls(level, [token for token, count in counts.most_common() if count >= min_count],
                   "<unk>")

    def __setstate__(self, state):
        if "tokenizer" in state:        # of an estimator of an older pickle
            how = state["tokenizer"]
            self.__init__(words if how == "word" else how, state["tokens"][1:], state["tokens"][0])
        else:
            vars(self).update(state)

    def __len__(self):
        return len(self.tokens)

    def split(self, data):
        """A text -> its tokens, known or not; of "char", "byte" and "word" strs that give the text again
        when joined.

        The bytes of one character are "" until the last of them.
        """
        if self.level == "byte":
            return list(map(self.decoder(), self.encode(data)))
        if callable(self.level):
            return self.level(data)
        if self.level == "whitespace":
            return data.replace("\n", f" {EOS} ").split()
        return list(data) if self.level == "char" else WORD.findall(data)

    def encode(self, data):
        """A text (or bytes, for level "byte") -> (N,) int32 ids."""
        if self.level == "byte":
            data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
            return np.frombuffer(data, np.uint8).astype(np.int32)
        if self.level != "char":
            return np.array([self.ids.get(word, 0) for word in self.split(data)], np.int32)
        codes = np.frombuffer(data.encode("utf-32-le", "surrogatepass"), "<u4")
        if not len(self._codes):
            return np.zeros(len(codes), np.int32)
        if len(codes) > 1 << 16:        # ten times as fast, where the table is worth its making
            numbers = np.zeros(int(self._codes[-1]) + 2, np.int32)
            numbers[self._codes] = self._numbers
            return numbers[np.minimum(codes, len(numbers) - 1)]
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._numbers[at], 0).astype(np.int32)

    def read(self, data):
        """A text -> its ids, and what of it is not in the vocabulary: token -> what it was read as.

        A character is read as one that looks like it, if the vocabulary has such: "e" for "é", a
        straight quote for a round one, the other case; else as the unknown, None.
        """
        if self.level == "byte":
            return self.encode(data), {}
        new = [token for token in dict.fromkeys(self.split(data)) if token not in self.ids]
        if self.level != "char":
            return self.encode(data), dict.fromkeys(new)
        replaced = {token: next((c for c in _alike(token) if c in self.ids), None) for token in new}
        ids = self.encode("".join(replaced.get(c, c) or c for c in data))
        return ids, replaced

    def decode(self, ids, after=False):
        """Ids -> the text; bytes that are no UTF-8 become the replacement character."""
        decoder = self.decoder(after)
        return "".join(map(decoder, ids)) + decoder(None)

    def decoder(self, after=False):
        """A function from one id after the other to the text that it completes; None ends it.

        The bytes of one character give "" until the last of them. after : whether a token of the same
        line stands before, from which a space parts those of "whitespace"
        """
        if self.level == "whitespace":
            return self._spaced(after)
        if self.level != "byte":
            return lambda n: "" if n is None else self.tokens[n]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda n: utf8.decode(b"", True) if n is None else utf8.decode(bytes([n]))

    def _spaced(self, after):
        def decode(n):
            nonlocal after
            if n is None:
                return ""
            token, space = self.tokens[n], " " if after else ""
            after = token != EOS
            return space + token if after else "\n"
        return decode

    @property
    def dtype(self):
        """The narrowest kind of integer that holds all ids."""
        return np.uint8 if len(self) <= 1 << 8 else np.uint16 if len(self) <= 1 << 16 else np.int32

    @property
    def unknown(self):
        """The id of the token for the unknown, or None."""
        return None if self.level == "byte" else 0

    @property
    def start(self):
        """The id to begin with where nothing was said before: a line end, if the text had one."""
        return 10 if self.level == "byte" else \
            self.ids.get(EOS if self.level == "whitespace" else "\n", min(1, len(self) - 1))
