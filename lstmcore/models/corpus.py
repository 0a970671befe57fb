"""Texts as they lie, read piece by piece: files in any encoding, gzip, standard input, strings.

A corpus may be larger than the memory: each pass over it reads anew, and its tokens lie in a temporary
file where they are many. Knows files, encodings and vocabularies; knows no model.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import importlib
import io
import itertools
import os
import re
import stat
import sys
import tempfile
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lstmcore._types import Array
from lstmcore.models.text import EOS, Vocabulary, count_chars

PIECE = 1 << 22             # bytes or characters at a time
LARGE = 1 << 25             # bytes that stay in memory; more lie in a temporary file
SHARE, MOST = 0.05, 4_000_000   # held out unless the user says how much, and at most so many tokens
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"))
EASTERN = {"Polish", "Czech", "Slovak", "Hungarian", "Slovene", "Croatian", "Romanian", "Turkish",
           "Lithuanian", "Latvian", "Estonian", "Vietnamese"}
SURE = {"utf-8", *(name for _, name in BOMS)}
FILE = re.compile(r"\S+\.\w{1,4}")      # what cannot be a text to learn from
TEXTS = (str, bytes, bytearray)
# Between texts of a list: a line end, or where they have such within, what ends a page.
LINE, PAGE = "\n", "\f"


def default_text() -> str:
    """Python's documentation of its own language, as every CPython carries it for `help()`.

    About 0.4 MB. Topics quote each other; a paragraph is kept where it stands first, so that the
    end of the text is not a copy of its beginning.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"


def decode(data: bytes, encoding: str | None = None, name: str = "the text") -> str:
    r"""Bytes as text, lines ended by \n. Without an encoding: what a byte order mark says, or UTF-8, or
    UTF-16 if it has the zeros of one, or what charset-normalizer finds, where it is installed, or else
    Windows-1252 and Latin-1, which fit all.

    >>> decode("naïve".encode("cp1252")), decode("naïve".encode("utf-16"))
    ('naïve', 'naïve')
    """
    return "".join(Part("char", data=data, encoding=encoding, name=name).pieces())


def listed(source: Any) -> Any:
    """A source as what can be looked at more than once: other iterables become lists."""
    if isinstance(source, (*TEXTS, os.PathLike, list, tuple)) or not isinstance(source, Iterable):
        return source
    return list(source)


class Part:
    """One text of a corpus: a file, "-" for standard input, or a str or bytes in memory.

    share : of its tokens, at its end, that is held out; `chars` is known once all was read
    """

    def __init__(self, level: str, *, path: Any = None, data: str | bytes = b"", share: float = 0.0,
                 encoding: str | None = None, name: str = "the text") -> None:
        self.level, self.path, self.share, self.chars = level, path, share, 0
        self.name = name if path is None else "standard input" if os.fspath(path) == "-" \
            else os.fsdecode(path)
        self._data = data.encode("utf-8", "surrogatepass") \
            if level == "byte" and isinstance(data, str) else data
        self._asked, self._found = encoding, None
        self._spool: Any = None

    @property
    def encoding(self) -> str | None:
        """That of its bytes, found out at the first call; None for a str, and for level "byte"."""
        if self.level == "byte" or isinstance(self._data, str):
            return None
        if self._found is None:
            self._found = self._asked or self._find_encoding()
        return self._found

    @property
    def guessed(self) -> bool:
        """Whether the encoding is but the likeliest."""
        return self._asked is None and self.encoding not in (None, *SURE)

    def pieces(self) -> Iterator[Any]:
        """The text in pieces, strs, or bytes for level "byte"; from the beginning in each call."""
        self.chars = 0
        for piece in self._strings():
            self.chars += count_chars(piece)
            yield piece

    def _strings(self):
        if isinstance(self._data, str):
            return (self._data[at:at + PIECE] for at in range(0, len(self._data), PIECE))
        return self._bytes() if self.level == "byte" else self._decoded(self.encoding)

    def _bytes(self):
        with self._opened() as file:
            packed = self.path is not None and file.read(2) == b"\x1f\x8b"
            file.seek(0, os.SEEK_END)
            most = limit = 200 * file.tell() + (64 << 20)   # text shrinks to a tenth, a bomb to 1/1000
            file.seek(0)
            try:
                unpacked = gzip.GzipFile(fileobj=file) if packed else file
                while piece := unpacked.read(PIECE):
                    yield piece
                    limit -= len(piece)
                    if packed and limit < 0:
                        raise ValueError(f"{self.name} is a gzip file that unpacks to more than {most} bytes")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{self.name} is a damaged gzip file: {error}") from None

    @contextlib.contextmanager
    def _opened(self):
        """A binary file, at its beginning, that can be read again."""
        if self.path is None:
            yield io.BytesIO(self._data)
        elif self._spool is not None:
            self._spool.seek(0)
            yield self._spool
        elif os.fspath(self.path) == "-":
            if sys.stdin is None:       # of services, or closed by the shell
                raise ValueError("standard input is closed")
            yield self._spooled(sys.stdin.buffer)
        else:
            with open(self.path, "rb") as file:
                yield file if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else self._spooled(file)

    def _spooled(self, stream):
        self._spool = tempfile.SpooledTemporaryFile(LARGE, prefix="lstmcore-")
        weakref.finalize(self, self._spool.close)
        with _naming_room():
            while piece := stream.read(PIECE):
                self._spool.write(piece)
        self._spool.seek(0)
        return self._spool

    def _decoded(self, encoding):
        r"""The text in this encoding, \r\n and \r as \n."""
        try:
            b"a".decode(encoding, "replace")        # refuses what is no encoding of texts
            decoder = codecs.getincrementaldecoder(encoding)()
        except LookupError:
            raise ValueError(f"unknown encoding {encoding!r}") from None
        lines, at = io.IncrementalNewlineDecoder(decoder, translate=True), 0
        for piece in itertools.chain(self._bytes(), [b""]):
            kept = len(decoder.getstate()[0])       # the beginning of a character
            try:
                text = lines.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                if not self._asked:
                    raise
                raise ValueError(f"{self.name} is not {encoding}: {error.reason} at byte "
                                 f"{at - kept + error.start}") from None
            at += len(piece)
            if text:
                yield text

    def _find_encoding(self):
        for candidate in self._encodings():
            with contextlib.suppress(UnicodeDecodeError):
                for _ in self._decoded(candidate):
                    pass
                return candidate

    def _encodings(self):
        """The encodings to try, the last of which takes any bytes."""
        head = next(self._bytes(), b"")[:4096]
        yield from (encoding for bom, encoding in BOMS if head.startswith(bom))
        if head.count(0) > len(head) // 4:
            yield "utf-16-be" if head[::2].count(0) > head[1::2].count(0) else "utf-16-le"
        yield "utf-8"
        if (guess := _likeliest(self._bytes())) is not None:
            yield guess
        yield from ("cp1252", "latin-1")


def _likeliest(pieces, most=1 << 16):
    """The encoding that charset-normalizer finds in the lines that are no ASCII, if it is there.

    It knows languages better than encodings. Of those that it finds as good as equal, the one wins in
    which fewest capitals follow small letters, as in Cyrillic that is read in another Cyrillic
    encoding; and then Windows-1252, but for languages that it cannot write.
    """
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    seen = b""
    for piece in pieces:
        seen += b"".join(line for line in piece.splitlines(True) if not line.isascii())
        if len(seen) >= most:
            break
    found = from_bytes(seen[:most])
    if (best := found.best()) is None:
        return None
    close = [match for match in found
             if match.chaos <= best.chaos + 0.05 and match.coherence >= best.coherence - 0.1]

    def oddness(match):
        letters = str(match)
        odd = sum(a.islower() and b.isupper() for a, b in zip(letters, letters[1:]))
        return odd, best.language not in EASTERN and "cp1252" not in match.could_be_from_charset
    likeliest = min(close, key=oddness)
    return "cp1252" if "cp1252" in likeliest.could_be_from_charset else likeliest.encoding.replace("_", "-")


class Corpus:
    """What a model reads of a source: a path, "-", a text, bytes, or a list of texts and paths.

    A str alone that names an existing file is a path, and one that can only be a file's name, such as
    "book.txt", must. In a list a str is a text, and a path is a `pathlib.Path`; a text of a list is
    ended by a line end, or by a form feed if there are line ends within.

    share : held out: the end of each file and text; of a list of 1/share texts or more, whole texts
    """

    def __init__(self, source: Any, level: str = "char", encoding: str | None = None,
                 share: float = 0.0) -> None:
        self.level = level
        common = {"encoding": encoding, "share": share}
        if not isinstance(source, (list, tuple)):
            self.parts = [_part(source, level, common)]
            return
        source = [item for item in source if not isinstance(item, TEXTS) or item]
        texts = [item for item in source if isinstance(item, TEXTS)]
        _warn_of_names(texts)
        texts = [decode(bytes(item), encoding) if isinstance(item, (bytes, bytearray)) and level != "byte"
                 else item for item in texts]
        border = _border(texts, level)
        ended = iter([item if item.endswith(end) else item + end for item in texts
                      for end in [border.encode() if isinstance(item, (bytes, bytearray)) else border]])
        if len(texts) == len(source) and share and len(texts) * share >= 1:
            kept, out = [], []
            for n, item in enumerate(ended):
                (out if int((n + 1) * share) > int(n * share) else kept).append(item)
            self.parts = [Part(level, data=_joined(some, level), share=part)
                          for some, part in ((kept, 0.0), (out, 1.0))]
        elif len(texts) == len(source) and not share:
            self.parts = [Part(level, data=_joined(ended, level))]
        else:
            self.parts = [Part(level, data=next(ended), **common)
                          if isinstance(item, TEXTS) else _part(item, level, common)
                          for item in source]

    @classmethod
    def of_text(cls, text: str, level: str) -> Corpus:
        """A text that is no path, whatever it says."""
        made = cls("", level)
        made.parts = [Part(level, data=text)]
        return made

    def pieces(self) -> Iterator[Any]:
        """All texts in pieces, one after the other; none cuts a token."""
        for part in self.parts:
            yield from self._whole(part.pieces())

    def read(self) -> Any:
        """The whole text at once."""
        return (b"" if self.level == "byte" else "").join(self.pieces())

    @property
    def chars(self) -> int:
        """How many characters there were in the last pass over them."""
        return sum(part.chars for part in self.parts)

    def vocabulary(self, max_size: int | None = None, min_count: int = 1) -> Vocabulary:
        """That of these texts: see `Vocabulary.of`."""
        if self.level == "byte":
            return Vocabulary(self.level)
        if self.level != "char":
            split, counts = Vocabulary(self.level).split, Counter()
            for piece in self.pieces():
                counts.update(split(piece))
            return Vocabulary.of_counts(counts, self.level, max_size, min_count)
        found = np.zeros(sys.maxunicode + 1, np.int64)
        for piece in self.pieces():
            codes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), "<u4")
            some = np.bincount(codes)
            found[:len(some)] += some
        counts = {chr(code): int(found[code]) for code in np.flatnonzero(found)}
        return Vocabulary.of_counts(counts, self.level, max_size, min_count)

    def beginning(self, vocabulary: Vocabulary) -> Any:
        """The first token, as it stands in the text."""
        piece = next(self.pieces())
        if self.level in ("char", "byte"):
            return piece[:1]
        token = vocabulary.split(piece)[0]
        return "\n" if token == EOS else token

    def encode(self, vocabulary: Vocabulary) -> Array:
        """The ids of all tokens, (N,) uint8, uint16 or int32; many lie in a temporary file."""
        return self._encode(vocabulary)[0]

    def divide(self, vocabulary: Vocabulary, most: float = float("inf")) -> tuple[Array, Array | None]:
        """The ids of the tokens to train on, and of those held out, at most so many; None for none."""
        tokens, lengths = self._encode(vocabulary)
        shares = [part.share for part in self.parts]
        if not any(shares):
            return tokens, None
        if (held_out := sum(n * share for n, share in zip(lengths, shares))) > most:
            shares = [share * most / held_out for share in shares]
        ends = np.cumsum(lengths)
        cuts = [end - round(n * share) for end, n, share in zip(ends, lengths, shares)]
        kept = [slice(end - n, cut) for end, n, cut in zip(ends, lengths, cuts)]
        out = [slice(cut, end) for cut, end in zip(cuts, ends)]
        return _taken(tokens, kept), _taken(tokens, out)

    def _encode(self, vocabulary):
        store, lengths = _Store(vocabulary.dtype), []
        for part in self.parts:
            before = store.count
            for piece in self._whole(part.pieces()):
                store.add(vocabulary.encode(piece))
            lengths.append(store.count - before)
        return store.array(), lengths

    def _whole(self, pieces):
        """Pieces of which none ends within a token."""
        if self.level in ("char", "byte"):
            yield from pieces
            return
        rest = ""
        for piece in pieces:
            rest += piece
            at = _end_of_token(rest)
            if at:
                yield rest[:at]
            rest = rest[at:]
        if rest:
            yield rest


class _Store:
    """Ids that come in pieces, in memory or, where they are many, in a file that has no name."""

    def __init__(self, dtype):
        self.dtype, self.count, self._pieces, self._file = np.dtype(dtype), 0, [], None

    def add(self, ids):
        ids = ids.astype(self.dtype)
        self.count += len(ids)
        self._pieces.append(ids)
        if self.count * self.dtype.itemsize <= LARGE:
            return
        with _naming_room():
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="lstmcore-")
            for piece in self._pieces:
                self._file.write(piece)
        self._pieces = []

    def array(self):
        if self._file is None:
            found = np.concatenate([np.empty(0, self.dtype), *self._pieces])
            found.flags.writeable = False
            return found
        with _naming_room(), self._file as file:        # the mapping stays
            file.flush()
            return np.asarray(np.memmap(file, self.dtype, "r", shape=(self.count,)))


def _taken(tokens, places):
    """The parts of the tokens at these places, as they are if it is one."""
    if len(places) == 1:
        return tokens[places[0]]
    store = _Store(tokens.dtype)
    for place in places:
        for at in range(place.start, place.stop, PIECE):
            store.add(tokens[at:min(at + PIECE, place.stop)])
    return store.array()


@contextlib.contextmanager
def _naming_room():
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(error.errno, f"{error.strerror}: a large text needs room for its tokens there; "
                      "TMPDIR names another place", tempfile.gettempdir()) from None


def _part(source, level, common):
    """The part that one source is."""
    if isinstance(source, os.PathLike) or isinstance(source, str) and _is_path(source):
        return Part(level, path=source, **common)
    if isinstance(source, str) and len(source) < 1024 and FILE.fullmatch(source):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
    if isinstance(source, TEXTS):
        return Part(level, data=source if isinstance(source, str) else bytes(source), **common)
    raise TypeError(f"a text must be str, bytes or a path, got {type(source).__name__}")


def _is_path(text):
    return text == "-" or 0 < len(text) < 1024 and "\n" not in text and "\0" not in text \
        and os.path.isfile(text)


def _warn_of_names(texts):
    """A list of names of files is a mistake that nobody makes on purpose."""
    if texts and all(isinstance(item, str) and item != "-" and _is_path(item) for item in texts):
        warnings.warn(f"a str in a list is a text, not a path, but {texts[0]!r} is a file too: "
                      f"pathlib.Path({texts[0]!r}) reads it", stacklevel=2)


def _border(texts, level):
    """What ends each text of a list."""
    within = any((b"\n" in item[:-1]) if isinstance(item, (bytes, bytearray)) else ("\n" in item[:-1])
                 for item in texts)
    return PAGE if within and level != "whitespace" else LINE


def _joined(texts, level):
    if level == "byte":
        return b"".join(item.encode("utf-8", "surrogatepass") if isinstance(item, str) else bytes(item)
                        for item in texts)
    return "".join(texts)


def _end_of_token(text):
    """A place in a text that no token of words goes beyond, as late as one is easily found."""
    if at := text.rfind("\n") + 1:
        return at
    at = text.rfind(" ")
    while at > 0 and not (text[at - 1].isalnum() and text[at + 1:at + 2].isalnum()):
        at = text.rfind(" ", 0, at)
    return max(at, 0)
