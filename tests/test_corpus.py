"""Texts as they lie: encodings, lists, what is held out, large ones in pieces and in little memory."""

import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lstmcore
from lstmcore import LanguageModel
from lstmcore.models import corpus, text
from lstmcore.models.corpus import Corpus
from lstmcore.models.sources import Streams, streams

STORY = "it was the best of times,\nit was the worst of times;\n\nthe age of  wisdom. " * 40
SMALL = dict(seq_length=8, batch_size=4, steps=3, progress=False)


@pytest.fixture
def pieces(monkeypatch, tmp_path):
    """Everything is read in pieces of a few characters, and lies in files."""
    monkeypatch.setattr(corpus.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(corpus, "PIECE", 7)
    monkeypatch.setattr(corpus, "LARGE", 64)


# ---- pieces ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", text.LEVELS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_pieces_have_the_vocabulary_and_the_ids_of_the_whole(pieces, tmp_path, level, encoding):
    data = STORY.replace("best", "bést") + "\r\nend – it's   over\rnow"
    want = data.replace("\r\n", "\n").replace("\r", "\n")
    path = tmp_path / "a"
    path.write_bytes(data.encode(encoding))
    if level == "byte":
        want = data.encode(encoding)
    read = Corpus(path, level)
    vocabulary = read.vocabulary(min_count=2)
    assert vocabulary.tokens == text.Vocabulary.of(want, level, min_count=2).tokens
    ids = read.encode(vocabulary)
    assert ids.tolist() == text.Vocabulary.of(want, level, min_count=2).encode(want).tolist()
    assert ids.dtype == np.uint8 and not ids.flags.writeable
    assert read.chars == text.count_chars(want) and read.read() == want
    assert os.listdir(tmp_path) == ["a"]        # the file of the ids has no name


def test_a_long_line_is_cut_between_words(pieces):
    line = "foo_bar's, well-known " * 30 + "日本語" * 30
    for level in "word", "whitespace":
        assert Corpus(line, level).vocabulary().tokens == text.Vocabulary.of(line, level).tokens


def test_ids_are_as_narrow_as_the_vocabulary_allows():
    for count, dtype in ((255, np.uint8), (256, np.uint16), (70_000, np.int32)):
        assert text.Vocabulary("word", map(str, range(count))).dtype == dtype
    many = "".join(map(chr, range(0x4e00, 0x4e00 + 500)))
    read = Corpus(many * 200)
    ids = read.encode(read.vocabulary())
    assert ids.dtype == np.uint16 and ids[-1] == 500 and (ids[:500] == np.arange(1, 501)).all()


def test_a_pipe_is_read_once_and_gzip_in_pieces(pieces, tmp_path, monkeypatch):
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(STORY.encode()))
    read = Corpus([packed, Path("-")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STORY.encode())))
    assert read.vocabulary().tokens == text.Vocabulary.of(STORY, "char").tokens
    assert read.read() == STORY * 2
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with subprocess.Popen([sys.executable, "-c", "open('pipe', 'w').write('abc' * 50)"], cwd=tmp_path):
            read = Corpus(tmp_path / "pipe")
            assert read.read() == read.read() == "abc" * 50


def test_a_gzip_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(gzip.compress(b"\0" * (1 << 28), 9)))
    assert len(Corpus(path, "byte").read()) < 1 << 19
    path.write_bytes(gzip.compress(b"\0" * (1 << 27), 9))
    with pytest.raises(ValueError, match="bomb.gz is a gzip file that unpacks to more than"):
        Corpus(path, "byte").read()


# ---- encodings ---------------------------------------------------------------------------------------

RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему.\n" * 5
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 5
CHINESE = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。\n" * 5
POLISH = "Litwo! Ojczyzno moja! ty jesteś jak zdrowie; Ile cię trzeba cenić, ten tylko się dowie.\n" * 5
GREEK = "Τον άντρα τον πολύπραγο τραγούδα μου, ω Μούσα, που περισσά πλανήθηκε.\n" * 5
WESTERN = "Le cœur a ses raisons que la raison ne connaît point. « Très bien », dit-elle.\n" * 5


@pytest.mark.skipif(not importlib.util.find_spec("charset_normalizer"), reason="needs charset-normalizer")
@pytest.mark.parametrize("written, encoding", [
    (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (RUSSIAN, "iso8859-5"), (RUSSIAN, "cp866"),
    (POLISH, "cp1250"), (CHINESE, "gb18030"), (GREEK, "iso8859-7"), (JAPANESE, "shift_jis"),
    (JAPANESE, "euc_jp"), (WESTERN, "cp1252"), ("naïve", "cp1252")])
def test_an_encoding_is_guessed(tmp_path, written, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(("plain beginning\n" * 400 + written).encode(encoding))
    read = Corpus(path)
    assert read.read().endswith(written) and read.parts[0].guessed


def test_without_a_detector_western_europe_is_guessed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    path = tmp_path / "a.txt"
    path.write_bytes(WESTERN.encode("cp1252"))
    read = Corpus(path)
    assert read.read() == WESTERN and read.parts[0].encoding == "cp1252" and read.parts[0].guessed
    for encoding in "utf-8", "utf-16":
        path.write_bytes(WESTERN.encode(encoding))
        assert not Corpus(path).parts[0].guessed
    assert not Corpus(WESTERN).parts[0].guessed


def test_where_an_encoding_fails_is_the_place_in_the_file(pieces, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("aé€".encode() * 3 + b"\xff" + b"b" * 20)
    with pytest.raises(ValueError, match="a.txt is not utf-8: invalid start byte at byte 18"):
        Corpus(path, encoding="utf-8").read()
    for encoding in "rot13", "hex":
        with pytest.raises(ValueError, match=f"unknown encoding '{encoding}'"):
            Corpus(path, encoding=encoding).read()


# ---- lists -------------------------------------------------------------------------------------------

def test_a_list_of_strs_is_texts_with_a_border(tmp_path, monkeypatch):
    assert Corpus(["google.com", "", "x.org\n"]).read() == "google.com\nx.org\n"
    assert Corpus(["a\nb", "c"]).read() == "a\nb\fc\f"
    assert Corpus([b"a", "b"], "byte").read() == b"a\nb\n"
    assert Corpus(["naïve".encode("cp1252"), "b"]).read() == "naïve\nb\n"
    assert Corpus(["a b\nc", "d"], "whitespace").read() == "a b\nc\nd\n"
    model = LanguageModel(hidden_size=5).fit((name for name in ["google.com", "python.org"]), validation=0,
                                             **SMALL)
    assert "\n" in model.vocabulary.ids and "/" not in model.vocabulary.ids
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("not this")
    with pytest.warns(UserWarning, match="a str in a list is a text, not a path, but 'a.txt' is a file too"):
        assert Corpus(["a.txt"]).read() == "a.txt\n"
    assert Corpus([Path("a.txt"), "and this"]).read() == "not thisand this\n"


def test_each_file_is_held_out_at_its_end(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 90 + name.upper() * 10)
    files = [tmp_path / "a", tmp_path / "b"]
    read = Corpus(files, share=0.1)
    vocabulary = read.vocabulary()
    train, held_out = read.divide(vocabulary)
    assert vocabulary.decode(train) == "a" * 90 + "b" * 90
    assert vocabulary.decode(held_out) == "A" * 10 + "B" * 10
    assert vocabulary.decode(read.divide(vocabulary, most=10)[1]) == "A" * 5 + "B" * 5
    assert Corpus(files).divide(vocabulary)[1] is None
    model = LanguageModel(hidden_size=5).fit(files, validation=0.1, **SMALL)
    assert (model.training["tokens"], model.training["held_out"]) == (180, 20)


def test_of_many_texts_whole_ones_are_held_out():
    names = [f"name{n}" for n in range(50)]
    read = Corpus(names, share=0.1)
    train, held_out = map(read.vocabulary().decode, read.divide(read.vocabulary()))
    assert held_out.split() == ["name9", "name19", "name29", "name39", "name49"]
    assert sorted((train + held_out).split()) == sorted(names)
    read = Corpus(["a" * 99, "b" * 99], share=0.1)             # too few of them
    assert read.vocabulary().decode(read.divide(read.vocabulary())[1]) == "a" * 9 + "\n" + "b" * 9 + "\n"


def test_a_very_long_text_holds_out_no_more_than_is_worth_its_time(monkeypatch):
    monkeypatch.setattr(corpus, "MOST", 20)
    model = LanguageModel(hidden_size=5).fit(STORY, **SMALL)
    assert model.training["held_out"] == 20
    model = LanguageModel(hidden_size=5).fit(STORY, validation=0.05, **SMALL)
    assert model.training["held_out"] == round(0.05 * len(STORY))


# ---- tokens that are there -------------------------------------------------------------------------------

LINES = " aer banknote <unk> N\n\n the <unk> said \n"


def test_whitespace_tokens_are_those_of_the_literature(tmp_path):
    vocabulary = text.Vocabulary.of(LINES, "whitespace")
    assert vocabulary.split(LINES) == ["aer", "banknote", "<unk>", "N", "<eos>", "<eos>", "the", "<unk>",
                                       "said", "<eos>"]
    assert vocabulary.tokens == ["<unk>", "<eos>", "N", "aer", "banknote", "said", "the"]
    ids = vocabulary.encode(LINES)
    assert vocabulary.decode(ids) == "aer banknote <unk> N\n\nthe <unk> said\n"
    assert vocabulary.decode(ids[6:8], after=True) == " the <unk>"
    assert vocabulary.decode(vocabulary.encode("N <eos> aer")) == "N\naer"
    assert vocabulary.start == 1


def test_a_model_of_whitespace_tokens_writes_and_measures(tmp_path):
    data = "one two <unk> four\nfive six\n" * 60
    model = LanguageModel("whitespace", hidden_size=24, num_layers=1, seed=0)
    model.fit(data, steps=150, lr=0.02, seq_length=10, batch_size=5, progress=False)
    assert model.sample("one two", 2, temperature=0) in (" four\n", " four five", " one two", " four six") \
        or "<unk>" not in model.sample("one two", 2, temperature=0)
    assert model.sample("five", 3, temperature=0) == " six\none"
    assert model.sample("six\n", 2, temperature=0) == "one two"
    assert model.beam_search("five", 3, width=2) == " six\none"
    found = model.evaluate(data)
    assert found.tokens == 60 * 8 - 1 and found.perplexity < 1.1 and found.unknown == 60
    assert found.bits_per_char == pytest.approx(found.nats * found.tokens / np.log(2) / (len(data) - 3))
    model.save(tmp_path / "m")
    again = LanguageModel.load(tmp_path / "m")
    assert again.level == "whitespace" and again.sample(seed=1) == model.sample(seed=1)


# ---- what a model has never seen ---------------------------------------------------------------------

def test_what_is_new_in_a_prime_is_replaced_with_a_warning():
    model = LanguageModel(hidden_size=5).fit("abc e'\"- " * 50, **SMALL)
    ids, replaced = model.vocabulary.read("É’“—\tzΩ")
    assert replaced == {"É": "e", "’": "'", "“": '"', "—": "-", "\t": " ", "z": None, "Ω": None}
    assert model.vocabulary.decode(ids) == "e'\"- \ufffd\ufffd"
    with pytest.warns(UserWarning, match="did not have: 'é' read as 'e', 'Ω' read as unknown"):
        one = model.sample("aéΩ", seed=1)
    assert len(one) == 400
    with pytest.warns(UserWarning):
        model.beam_search("Ω", 3)
    words = LanguageModel("word", hidden_size=5, min_count=1).fit("the cat sat. " * 50, **SMALL)
    with pytest.warns(UserWarning, match="' dog' read as unknown"):
        words.sample("the dog", 3)


# ---- large texts -----------------------------------------------------------------------------------------

def test_windows_of_narrow_mapped_tokens_are_those_of_wide_ones(monkeypatch):
    monkeypatch.setattr(corpus, "LARGE", 64)
    read = Corpus(STORY)
    ids = read.encode(read.vocabulary())
    wide = np.array(ids, np.int32)
    narrow, whole = Streams(ids, None, 5, 9), Streams(wide, None, 5, 9)
    assert narrow.digest == whole.digest and narrow.length == whole.length
    x, targets = streams(wide, 5, 9)
    for start in range(0, narrow.length, 9):
        for got, want in zip(narrow._window(start, start + 9), (x, targets)):
            assert got.dtype == np.int32 and (got == want[start:start + 9]).all()


MEMORY = """
import json, resource, sys, time
from pathlib import Path
import lstmcore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
model = lstmcore.LanguageModel(sys.argv[2], hidden_size=16, num_layers=1, min_count=1)
first = []
model.fit(Path(sys.argv[1]), steps=30, seq_length=50, batch_size=32, progress=False, evaluate_every=1,
          callbacks=lambda m, r: first.append(time.perf_counter() - start) or False, validation=1e-4)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, first[0]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units and meanings elsewhere")
@pytest.mark.parametrize("level", ["char", "byte"])
def test_a_large_text_takes_less_memory_than_its_size(tmp_path, level):
    path, size = tmp_path / "big.txt", 160 << 20
    words = " ".join(np.random.default_rng(0).choice(STORY.split(), 1 << 18)) + " naïve €\n"
    piece = words.encode()
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(piece)
    done = subprocess.run([sys.executable, "-c", MEMORY, path, level], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(lstmcore.__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    grown, start = json.loads(done.stdout)
    assert grown * 1024 < size


def test_no_room_for_tokens_names_the_place(monkeypatch):
    monkeypatch.setattr(corpus, "LARGE", 64)
    monkeypatch.setattr(corpus.tempfile, "tempdir", None)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(corpus.tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(OSError, match="No space left on device: .*TMPDIR names another place"):
        Corpus(STORY).encode(text.Vocabulary.of(STORY, "char"))
