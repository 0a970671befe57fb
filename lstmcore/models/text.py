"""Text in, token ids out: where a training text comes from, and the vocabulary that numbers it.

Knows files, encodings and tokens; knows no model.
"""

import codecs
import errno
import gzip
import importlib
import io
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np

from lstmcore import checks

LEVELS = ("char", "byte", "word")
UNKNOWN = {"char": "\ufffd", "word": " <unk>"}      # what stands for a token never seen
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"))

# A word with the space before it, so that joining the tokens gives the text back.
WORD = re.compile(r" ?\w+(?:['’]\w+)*| ?<unk>| ?[^\w\s]+| +(?= )|\s")

LOWER = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

FILE = re.compile(r"\S+\.\w{1,4}")      # what cannot be a text to learn from


def default_text():
    """Python's documentation of its own language, as every CPython carries it for `help()`.

    About 0.4 MB. Topics quote each other; a paragraph is kept where it stands first, so that the
    end of the text is not a copy of its beginning.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"


def read_bytes(source):
    """The content of a file, or of standard input for "-"; gzip is recognized and unpacked."""
    if os.fspath(source) == "-":
        if sys.stdin is None:       # of services, or closed by the shell
            raise ValueError("standard input is closed")
        data = sys.stdin.buffer.read()
    else:
        with open(source, "rb") as file:
            data = file.read()
    if data[:2] == b"\x1f\x8b":
        limit = 200 * len(data) + (64 << 20)        # text shrinks to a tenth, a bomb to 1/1000
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
            if len(data) > limit:
                raise ValueError(f"{source} is a gzip file that unpacks to more than {limit} bytes")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{source} is a damaged gzip file: {error}") from None
    return data


def decode(data, encoding=None, name="the text"):
    r"""Bytes as text, lines ended by \n. Without an encoding: what a byte order mark says, or
    UTF-8, or UTF-16 if it has the zeros of one, or else Windows-1252 and Latin-1, which fit all.

    >>> decode("naïve".encode("cp1252")), decode("naïve".encode("utf-16"))
    ('naïve', 'naïve')
    """
    for candidate in [encoding] if encoding else _encodings(data):
        try:
            text = data.decode(candidate)
        except UnicodeDecodeError as error:
            if encoding:
                raise ValueError(f"{name} is not {encoding}: {error.reason} at byte "
                                 f"{error.start}") from None
        except LookupError:
            raise ValueError(f"unknown encoding {encoding!r}") from None
        else:
            return text.replace("\r\n", "\n").replace("\r", "\n")


def _encodings(data):
    """The encodings to try, the last of which takes any bytes."""
    yield from (encoding for bom, encoding in BOMS if data.startswith(bom))
    head = data[:4096]
    if head.count(0) > len(head) // 4:
        yield "utf-16-be" if head[::2].count(0) > head[1::2].count(0) else "utf-16-le"
    yield from ("utf-8", "cp1252", "latin-1")


def load(source, level="char", encoding=None):
    """What a model of this level reads of `source`: text, or bytes for level "byte".

    source : a path; "-" for standard input; text or bytes themselves; or a list of these, joined.
        A str that names an existing file is a path, and one that can only be a file's name, such as
        "book.txt", must.
    """
    if isinstance(source, (list, tuple)):
        parts = [load(part, level, encoding) for part in source]
        return (b"" if level == "byte" else "").join(parts)
    if isinstance(source, os.PathLike) or isinstance(source, str) and _is_path(source):
        data, name = read_bytes(source), os.fspath(source)
        return data if level == "byte" else decode(data, encoding, name)
    if isinstance(source, str) and len(source) < 1024 and FILE.fullmatch(source):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
    if isinstance(source, str):
        return source.encode("utf-8", "surrogatepass") if level == "byte" else source
    if isinstance(source, (bytes, bytearray)):
        return bytes(source) if level == "byte" else decode(bytes(source), encoding)
    raise TypeError(f"a text must be str, bytes or a path, got {type(source).__name__}")


def _is_path(text):
    return text == "-" or 0 < len(text) < 1024 and "\n" not in text and "\0" not in text \
        and os.path.isfile(text)


def words(text):
    """A text -> its words in lower case, and single marks; blanks are left out."""
    return LOWER.findall(text.lower())


def count_chars(data):
    """How many characters a text has; of bytes, those that begin one in UTF-8."""
    if isinstance(data, str):
        return len(data)
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80))


class Vocabulary:
    """The tokens of a level and their numbers.

    Level "byte" has 256 tokens. "char", "word" and a function str -> list of tokens have token 0,
    `unknown`, for whatever is not among `tokens`, which stand in the order given. Words keep the
    space before them.

    >>> v = Vocabulary.of("abracadabra", "char")
    >>> v.encode("cabin").tolist(), v.decode([1, 2, 5])
    ([3, 1, 2, 0, 0], 'abr')
    """

    def __init__(self, level, tokens=(), unknown=None):
        self.level = level if callable(level) else checks.choice("level", level, LEVELS)
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
        if level == "byte":
            return cls(level)
        counts = Counter(cls(level).split(data))
        counts.pop(UNKNOWN[level], None)
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
        """A text -> its tokens, known or not; of a level strs that give the text again when joined.

        The bytes of one character are "" until the last of them.
        """
        if self.level == "byte":
            return list(map(self.decoder(), self.encode(data)))
        if callable(self.level):
            return self.level(data)
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
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._numbers[at], 0).astype(np.int32)

    def decode(self, ids):
        """Ids -> the text; bytes that are no UTF-8 become the replacement character."""
        decoder = self.decoder()
        return "".join(map(decoder, ids)) + decoder(None)

    def decoder(self):
        """A function from one id after the other to the text that it completes; None ends it.

        The bytes of one character give "" until the last of them.
        """
        if self.level != "byte":
            return lambda n: "" if n is None else self.tokens[n]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda n: utf8.decode(b"", True) if n is None else utf8.decode(bytes([n]))

    @property
    def unknown(self):
        """The id of the token for the unknown, or None."""
        return None if self.level == "byte" else 0

    @property
    def start(self):
        """The id to begin with where nothing was said before: a line end, if the text had one."""
        return 10 if self.level == "byte" else self.ids.get("\n", min(1, len(self) - 1))
