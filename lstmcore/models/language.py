"""LanguageModel: an LSTM that reads a text and tells, for each place in it, what may come next.

The network predicts token t+1 from tokens 1..t; trained by `lstmcore.models.training`, measured in
nats per token, it writes by drawing from its own predictions (Graves 2013). It is saved as one
safetensors file that holds weights, configuration, vocabulary and, if wanted, the training run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from lstmcore import distributed, formats, scalars
from lstmcore._types import Cell, Compute, Dtype, Path
from lstmcore.formats import description, disk, safetensors
from lstmcore.models import corpus, generation, text
from lstmcore.models.corpus import Corpus
from lstmcore.models.network import OPTIONS, Model, Network, checked, checked_options
from lstmcore.models.progress import Bar, Lines, opening
from lstmcore.models.sources import Streams, total_nats
from lstmcore.models.training import Budget, Settings, Trainer, check_run, checked_history
from lstmcore.module import blank
from lstmcore.precision import Quantized

Source: TypeAlias = Path | bytes | Iterable[Path | bytes]
Callback: TypeAlias = "Callable[[LanguageModel, dict[str, Any]], object]"


class Evaluation(NamedTuple):
    """How well a text was predicted; nats and perplexity are per token."""

    nats: float
    bits_per_char: float
    perplexity: float
    tokens: int
    unknown: int


KEY, RUN = description.MODEL, "lstmcore.training"


class LanguageModel(Model):
    """A character, byte or word model of text.

    Parameters
    ----------
    level : "char", "byte", "word" for languages that put spaces between words, or "whitespace" for
        texts that are cut into tokens: what stands between white space, and "<eos>" for a line end
    cell : "lstm", "gru" or "rnn"
    hidden_size, num_layers : of the recurrent layers
    embed_size : width of the table of tokens, by default 64, of words 128; 0 for one-hot rows,
        which learn slower (on Python's documentation 2.40 nats after an epoch, not 1.73)
    dropout : probability, between the layers and before the output, in training
    peepholes, layer_norm : as in `lstmcore.LSTM`
    recurrent_dropout, zoneout : likewise, of an LSTM, in training
    weight_dropout, locked_dropout : likewise, of every cell
    vocab_size : keep at most so many tokens, the most frequent; None for all
    min_count : keep tokens that the text has so often; by default 2 for words and 1 for characters
    init_uniform : all parameters, biases too, are drawn from -init_uniform to init_uniform; by default
        each layer has its own way, and the LSTM a forget bias of 1
    dtype : "float32" or "float64"
    compute : "bfloat16" for products on operands rounded to it, in training too: see `lstmcore.LSTM`
    seed : int, of the weights and of dropout

    Attributes, after `fit`: `network`, `vocabulary`, `history` (a dict per evaluation), `outcome`
    ("finished", "no progress", "SIGINT", ...), `training` (a dict: how long the text of the last
    training was, its settings and budget).

    >>> from lstmcore import LanguageModel
    >>> model = LanguageModel(hidden_size=32, num_layers=1, seed=0)
    >>> text = "she sells sea shells by the sea shore. " * 100
    >>> model.fit(text, steps=80, lr=0.02, seq_length=20, batch_size=8, progress=False)
    LanguageModel(hidden_size=32, num_layers=1)
    >>> model.sample("she sells ", length=28, temperature=0.1, seed=0)
    'sea shells by the sea shore.'
    >>> round(model.perplexity(text), 1)
    1.0
    """

    cell: Cell
    hidden_size: int
    num_layers: int
    embed_size: int
    dropout: float
    peepholes: bool
    recurrent_dropout: float
    zoneout: float
    weight_dropout: float
    locked_dropout: bool
    layer_norm: Literal["products", "gates"] | None
    dtype: Dtype
    compute: Compute | None

    def __init__(self, level: Literal["char", "byte", "word", "whitespace"] = "char", *, cell: Cell = "lstm",
                 hidden_size: int = 256, num_layers: int = 2, embed_size: int | None = None,
                 dropout: float = 0.0, peepholes: bool = False, recurrent_dropout: float = 0.0,
                 zoneout: float = 0.0, weight_dropout: float = 0.0, locked_dropout: bool = False,
                 layer_norm: Literal["products", "gates"] | None = None, vocab_size: int | None = None,
                 min_count: int | None = None, init_uniform: float | None = None,
                 dtype: Dtype = "float32", compute: Compute | None = None,
                 seed: int | None = 0) -> None:
        self.level = scalars.choice("level", level, text.LEVELS)
        if embed_size is None:
            embed_size = 128 if level in ("word", "whitespace") else 64
        if min_count is None:
            min_count = 2 if level == "word" else 1
        vars(self).update(checked(
            cell=cell, hidden_size=hidden_size, num_layers=num_layers, embed_size=embed_size,
            dropout=dropout, peepholes=peepholes, dtype=dtype, compute=compute), **checked_options(
            cell, recurrent_dropout=recurrent_dropout, zoneout=zoneout, weight_dropout=weight_dropout,
            locked_dropout=locked_dropout, layer_norm=layer_norm))
        self.vocab_size = None if vocab_size is None else scalars.size("vocab_size", vocab_size, 2)
        self.min_count = scalars.size("min_count", min_count)
        self.init_uniform = None if init_uniform is None else scalars.number("init_uniform", init_uniform)
        self.seed = None if seed is None else scalars.size("seed", seed, at_least=0)
        self.network: Any = None
        self.vocabulary: Any = None
        self.outcome: str | None = None
        self.history: list[dict[str, Any]] = []
        self.training: dict[str, Any] = {}

    def fit(self, source: Source | None = None, *, validation: float | Source | None = None,
            epochs: float | None = None, minutes: float | None = None, steps: int | None = None,
            checkpoint: Path | None = None, resume: Path | None = None,
            callbacks: Callback | Iterable[Callback] = (), progress: bool | Literal["lines"] = True,
            encoding: str | None = None, comm: Any = None, **settings: Any) -> LanguageModel:
        """Train on a text.

        Parameters
        ----------
        source : the text, a path, "-" for standard input, bytes, or a list; by default Python's
            documentation of its own language. A str that names a file is a path, but in a list a
            str is a text and a path a `pathlib.Path`: texts end with a line end, or if they have
            such within with a form feed, so that the model learns where one ends
        validation : a share of each file or text, at its end, or of many texts some of them; or
            another text or path; 0 for none. By default 0.05, of a very long text 4 million tokens
        epochs, minutes, steps : when to end, whatever comes first, counted from the very start; by
            default after 10 epochs, and in a resumed run as planned
        checkpoint : a path to save the model to after every evaluation and at the end, together
            with what `resume` needs
        resume : a checkpoint whose run is to be continued, on the same text. It goes on with the
            settings and, bit for bit, with the numbers that it would have had without the break
        callbacks : a function, or several, of the model and a dict: step, epoch, loss, validation,
            lr, seconds, tokens_per_second, best. Called after every evaluation; it may sample,
            evaluate and generate, which changes no bit of the run; a true result ends the training
        progress : say on standard error what is trained on what, and show a bar; "lines": a line
            there for each tenth of the budget without an evaluation
        encoding : of files; found out by default
        comm : a communicator of mpi4py, whose processes all make this call: each computes its share
            of every batch. Rank 0 reads the text, prints, calls `callbacks` and writes; all end with
            the same model, whose bits depend on `shards` (8), not on how many processes there are:
            see docs/distributed.md
        **settings : seq_length=100, batch_size=64, optimizer="adam", lr=2e-3, clip=5.0,
            schedule=None, decay=0.97, decay_after=10, warmup=0, momentum=0.9, weight_decay=0.0,
            evaluate_every=None, patience=None, shards=None, reduction="tree", wire=None: see
            `lstmcore.models.training.Settings`

        The model ends with the weights of its best evaluation. SIGINT (Ctrl-C) ends the training
        after the current step, saves and returns. A model that was fitted before goes on from its
        weights, with its vocabulary. Returns self.

        Raises FloatingPointError where the loss is no longer finite, naming the step; the model
        has its best weights then, and the checkpoint stays as it was.
        """
        budget = dict(epochs=epochs, minutes=minutes, steps=steps)
        with distributed.training(comm) as processes:
            return self._fit(processes, source, validation, budget, checkpoint, resume, callbacks,
                             progress, encoding, settings)

    def _fit(self, processes, source, validation, budget, checkpoint, resume, callbacks, progress,
             encoding, settings):
        root = processes.rank == 0
        source, validation = corpus.listed(source), corpus.listed(validation)
        if processes.size > 1:
            processes.agree_on_build(**{
                "the model": self.config, "a fitted model": self.network is not None,
                "the settings": settings, "the budget": budget, "a checkpoint": checkpoint is not None,
                "a run to resume": resume is not None, "the text": _named(source),
                "the validation": _named(validation)})
        if checkpoint is not None:
            processes.at_root(lambda: _check_place(checkpoint))
        run = None if resume is None else processes.at_root(lambda: self._load_run(resume))
        callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
        if isinstance(validation, (int, float)):
            settings["validation"] = scalars.number("validation", validation)
        settings = Settings.of({**(run[2]["settings"] if run else {}), **settings})
        shards = settings.divide(processes)
        if run and set(budget.values()) == {None}:
            budget = run[2]["budget"]
        budget = Budget(**budget)
        train, held_out, facts = self._shared_tokens(processes, source, validation, settings, encoding)
        # Nothing of this names a file: models are shared.
        encodings = {part["encoding"] for part in facts["texts"]} - {None}
        self.training = {**{name: value for name, value in facts.items() if name != "texts"},
                         "encodings": sorted(encodings), "settings": dataclasses.asdict(settings),
                         "budget": dataclasses.asdict(budget)}

        bar = (Lines() if progress == "lines" else Bar()) if progress and root else None
        source = Streams(train, held_out, settings.batch_size, settings.seq_length, shards)
        trainer = Trainer(self.network, source, settings, budget, tick=bar and bar.tick,
                          report=lambda record: report(record), shards=shards)

        def report(record):
            self.history = [h for h in self.history if h is not record] + [record]
            if bar:
                bar.report(trainer, record)
            if checkpoint is not None:
                self._save_run(checkpoint, trainer)
            return any([callback(self, record) for callback in callbacks if root])

        if run:
            try:
                trainer.restore(run[1], run[2], run[0])
            except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
                raise _damaged_run(resume, error) from None
        self.history = list(trainer.history)
        if bar:
            bar.begin(trainer, opening(**facts, unit=self.level, model=self.sizes()))
        try:
            trainer.run()
        except FloatingPointError as error:
            kept = "" if checkpoint is None else (
                f"; {os.fspath(checkpoint)} keeps the best weights before that"
                if trainer.chosen is not None else "; nothing was saved yet")
            raise FloatingPointError(f"{error}{kept}") from None
        finally:
            if bar:
                bar.close(trainer)
        self.outcome = trainer.outcome
        if checkpoint is not None:
            self._save_run(checkpoint, trainer)
        return self

    def evaluate(self, source: Source, *, encoding: str | None = None) -> Evaluation:
        """How well the model predicts a text (or a file; see `fit`), all of it but the first token.

        Returns (nats, bits_per_char, perplexity, tokens, unknown): nats and perplexity are per
        token; unknown counts the tokens that are the vocabulary's one for the unknown.
        """
        self._trained()
        read = source if isinstance(source, Corpus) else Corpus(corpus.listed(source), self.level, encoding)
        tokens, chars = read.encode(self.vocabulary), read.chars
        n = len(tokens) - 1
        if n < 1:
            raise ValueError(f"a text to evaluate needs 2 tokens, got {len(tokens)}")
        nats = total_nats(self.network.eval(), tokens)
        chars = max(1, chars - text.count_chars(read.beginning(self.vocabulary)))
        unknown = 0 if self.level == "byte" else n - int(np.count_nonzero(tokens[1:]))
        perplexity = math.exp(nats / n) if nats / n < 700 else math.inf
        return Evaluation(nats / n, nats / math.log(2) / chars, perplexity, n, unknown)

    def perplexity(self, source: Source, *, encoding: str | None = None) -> float:
        """e to the mean nats per token of a text or file."""
        return self.evaluate(source, encoding=encoding).perplexity

    def bits_per_char(self, source: Source, *, encoding: str | None = None) -> float:
        """Bits per character (not per token) of a text or file."""
        return self.evaluate(source, encoding=encoding).bits_per_char

    def generate(self, prime: str | bytes = "", length: int = 400, *, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
                 stop: str | Iterable[str] | None = None) -> Iterator[str]:
        """An iterator over the pieces of a text that goes on from `prime`: see `sample`."""
        self._trained()
        prime = generation.ids_of(self.vocabulary, prime)
        draw = generation.drawing(temperature, top_k, top_p, seed)
        writer = generation.Writer(self.network.eval(), self.vocabulary)
        writer.read(prime)
        return writer.write(scalars.size("length", length, 0), draw, generation.check_stop(stop))

    def sample(self, prime: str | bytes = "", length: int = 400, *, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
               stop: str | Iterable[str] | None = None) -> str:
        """A text that goes on from `prime`, without it.

        Parameters
        ----------
        prime : what was written before; "" begins as after the end of a line
        length : tokens to draw
        temperature : below 1 plays safe, above 1 dares; 0 always takes the most likely token
        top_k : draw from the k most likely tokens only
        top_p : draw from the fewest most likely tokens with so much probability in all
        seed : int, for the same text again
        stop : a str, or several: end right after the first of them appears
        """
        return "".join(self.generate(prime, length, temperature=temperature, top_k=top_k,
                                     top_p=top_p, seed=seed, stop=stop))

    def beam_search(self, prime: str | bytes = "", length: int = 100, *, width: int = 8,
                    stop: str | Iterable[str] | None = None) -> str:
        """The most likely text of `length` tokens after `prime` that a search of this width finds.

        With `stop`, texts that end with it compete by their mean log-probability per token.
        """
        self._trained()
        prime = generation.ids_of(self.vocabulary, prime)
        return generation.beam_search(self.network.eval(), self.vocabulary, prime,
                                      scalars.size("length", length, 0), scalars.size("width", width),
                                      generation.check_stop(stop))

    def save(self, path: Path) -> None:
        """Write the model to one safetensors file, at once or not at all."""
        self._trained()
        _check_place(path)
        self._write(path, safetensors.stored(self.network), {})

    @classmethod
    def load(cls, path: Path) -> LanguageModel:
        """The model in a file that `save` or a training run wrote."""
        return cls._of(path, *_read(path))

    @classmethod
    def _of(cls, path, arrays, metadata):
        weights = {name: a for name, a in arrays.items() if not name.startswith("training.")}
        with formats.naming(path):
            try:
                saved = json.loads(metadata[KEY])
                description.check_version(path, saved)
                model = cls(**saved["config"])
                model.vocabulary = text.Vocabulary(saved["level"], saved["tokens"])
                model.history, model.outcome = checked_history(saved["history"]), saved["outcome"]
                model.training = dict(saved.get("training", {}))        # none in older files
                weights = description.joined(weights)
                model._check_sizes(description.outlines(weights))
                model._set(weights)
            except (KeyError, TypeError, AttributeError, OverflowError, RecursionError,
                    json.JSONDecodeError) as error:
                raise ValueError(f"{os.fsdecode(path)} holds a language model that this version of "
                                 f"lstmcore cannot read: {error!r:.200}") from None
        model.network.eval()
        return model

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the constructor, as they act."""
        names = ("level cell hidden_size num_layers embed_size dropout peepholes vocab_size "
                 "min_count init_uniform dtype compute seed").split()
        return {**{name: getattr(self, name) for name in (*names, *OPTIONS)},
                "compute": self.compute or self.dtype}

    def __repr__(self) -> str:
        default = {**LanguageModel(self.level).config, "compute": self.dtype}
        said = [f"{name}={value!r}" for name, value in self.config.items()
                if value != default[name]]
        level = [] if self.level == "char" else [repr(self.level)]
        return f"LanguageModel({', '.join(level + said)})"

    def _set(self, weights):
        """Make the network with these weights, floats or int8 numbers with their scales."""
        if not any(isinstance(a, Quantized) for a in weights.values()):
            self._build()
            self.network.load_state_dict(weights)
            return
        if self.dtype != "float32":
            raise ValueError(f"int8 weights are of float32 models, this one is {self.dtype}")
        with blank():
            self._build()
            self.network.load_state_dict(description.outlines(weights))
        self.network._fill(weights)

    def _build(self):
        names = "cell hidden_size num_layers embed_size dropout peepholes dtype compute seed".split()
        names += [name for name, usual in OPTIONS.items() if getattr(self, name) != usual]
        self.network = Network(len(self.vocabulary), **{n: getattr(self, n) for n in names})
        if self.init_uniform is not None:
            rng = np.random.default_rng(self.seed)
            for p in self.network.parameters().values():
                p[...] = rng.uniform(-self.init_uniform, self.init_uniform, p.shape)

    def _check_sizes(self, weights):
        """The sizes that a file claims are those of its weights, before they take memory."""
        V, rows = len(self.vocabulary), description.GATES[self.cell.upper()] * self.hidden_size
        shapes = {"head.weight": (V, self.hidden_size)}
        if self.embed_size:
            shapes["embedding.weight"] = V, self.embed_size
        named = [name for name in weights if name.startswith("recurrent.weight_hh_l")]
        shapes.update(dict.fromkeys(named, (rows, self.hidden_size)))
        if len(named) != self.num_layers:
            raise ValueError(f"a model of {self.num_layers} layers has weights of {len(named)}")
        for name, shape in shapes.items():
            if weights[name].shape != shape:
                raise ValueError(f"{name} must be {shape}, got {weights[name].shape}")

    def _tokens(self, source, validation, settings, encoding):
        """Tokens to train on and to validate by, or None; makes vocabulary and network once."""
        apart = validation is not None and not isinstance(validation, (int, float))
        share = 0 if apart else corpus.SHARE if settings.validation is None else settings.validation
        most = corpus.MOST if settings.validation is None else math.inf
        read = Corpus(corpus.default_text() if source is None else source, self.level, encoding, share)
        held_out = Corpus(validation, self.level, encoding) if apart else None
        if self.network is None:
            self.vocabulary = read.vocabulary(self.vocab_size, self.min_count)
            self._build()
        train, part = read.divide(self.vocabulary, most)
        if not read.chars:
            raise ValueError("the text to train on is empty")
        if apart:
            part = held_out.encode(self.vocabulary)
        for name, tokens in ("train on", train), ("validate by", part):
            if tokens is not None and len(tokens) < 2:
                hint = ""
                if isinstance(source, str) and source != "-" and len(source) < 200:
                    hint = f" ({source[:60]!r}: is that a file that does not exist?)"
                elif share and len(train) + len(part) > 1:
                    hint = (f": validation is {share:g} of {len(train) + len(part)} tokens; choose "
                            "another share, or 0 for none")
                raise ValueError(f"the text to {name} needs at least 2 tokens, got "
                                 f"{len(tokens)}{hint}")
        told = [{"name": text.name, "encoding": text.encoding, "guessed": text.guessed}
                for text in [*read.parts, *(held_out.parts if held_out else ())]]
        return train, part, {"texts": told, "characters": read.chars, "tokens": len(train),
                             "held_out": None if part is None else len(part)}

    def _shared_tokens(self, processes, *given):
        """`_tokens`, read by rank 0; the others take over its vocabulary, and make their networks."""
        if processes.size == 1:
            return self._tokens(*given)
        train = held_out = None

        def read():
            nonlocal train, held_out
            train, held_out, facts = self._tokens(*given)
            return self.vocabulary, facts
        self.vocabulary, facts = processes.at_root(read)
        if self.network is None:
            self._build()
        return processes.shared(train), processes.shared(held_out), facts

    def _load_run(self, path):
        """(weights, arrays, meta) of the run in a checkpoint, whose vocabulary is taken over."""
        arrays, metadata = _read(path)
        if RUN not in metadata:
            raise ValueError(f"{os.fsdecode(path)} holds a model but no training run to resume: "
                             "a finished one is kept by fit(checkpoint=...), or train --checkpoint")
        saved = LanguageModel._of(path, arrays, metadata)
        if self.network is None:
            self.vocabulary = saved.vocabulary
            self._build()
        saved.check_same(self)
        if len(self.vocabulary) != len(saved.vocabulary):
            raise ValueError(f"{os.fsdecode(path)} is the run of a model of {len(saved.vocabulary)} "
                             f"tokens, this one has {len(self.vocabulary)}")
        weights = {name: a for name, a in arrays.items() if not name.startswith("training.")}
        rest = {name[len("training."):]: a for name, a in arrays.items()
                if name.startswith("training.")}
        try:
            meta = json.loads(metadata[RUN])
            check_run(meta)
        except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
            raise _damaged_run(path, error) from None
        return weights, rest, meta

    def _save_run(self, path, trainer):
        weights, arrays, meta = trainer.snapshot()
        if trainer.shards and not trainer.shards.is_root:
            return
        self._write(path, {**weights, **{f"training.{name}": a for name, a in arrays.items()}},
                    {RUN: json.dumps(meta)})

    def _write(self, path, arrays, metadata):
        tokens = self.vocabulary.tokens[1:] if self.level != "byte" else []
        config = {name: value for name, value in self.config.items()
                  if (name, value) not in (("compute", self.dtype), ("init_uniform", None), *OPTIONS.items())}
        # without these an older lstmcore reads it
        saved = {"version": description.VERSION, "config": config, "level": self.level,
                 "tokens": tokens,
                 "history": self.history, "outcome": self.outcome, "training": self.training}
        safetensors.write(path, arrays, {KEY: json.dumps(saved), **metadata})

    def check_same(self, other: LanguageModel) -> None:
        """ValueError unless another model may go on with this one's run."""
        for name, then in self.config.items():
            if (now := other.config[name]) != then:
                raise ValueError(f"a resumed run cannot change {name} from {then} to {now}")

    def _trained(self):
        if self.network is None:
            raise ValueError("this LanguageModel has no weights yet: call fit first, or load one")
        return self.network

    def sizes(self) -> str:
        """The sizes of the trained model, in words."""
        one = {"char": "characters", "byte": "bytes", "word": "words", "whitespace": "tokens"}[self.level]
        count = sum(p.size for p in self._trained().parameters().values())
        return (f"{self.cell}, {self.num_layers} x {self.hidden_size}, {count:,} parameters, a vocabulary of "
                f"{len(self.vocabulary):,} {one}")


def _check_place(path):
    """ValueError or OSError unless a model can be saved at this path."""
    if os.fsdecode(path).endswith((".onnx", ".h5", ".keras", ".pt", ".pth")):
        raise ValueError("a LanguageModel is saved as .safetensors; lstmcore.save(model, 'x.onnx') "
                         "writes a graph of it, and lstmcore.convert(file, 'x.weights.h5') the "
                         f"recurrent layers; got {os.fsdecode(path)!r}")
    disk.check_writable(path)


def _named(source):
    """What processes compare of a source: names of files, and digests of texts."""
    if isinstance(source, (str, bytes)) and len(source) > 200:
        source = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        return f"a text with the SHA-256 {hashlib.sha256(source).hexdigest()}"
    if isinstance(source, (str, bytes, float, int, os.PathLike, type(None))):
        return source
    if isinstance(source, (list, tuple)):
        return [_named(part) for part in source]
    return type(source).__name__


def _damaged_run(path, error):
    return ValueError(f"{os.fsdecode(path)} holds a training run that is damaged or of another "
                      f"version of lstmcore: {error!r:.200}")


def _read(path):
    try:
        arrays, metadata = safetensors.read(path)
    except ValueError as error:
        raise ValueError(f"{os.fsdecode(path)} is no model that can be read: {error}") from None
    if KEY not in metadata:
        raise ValueError(f"{os.fsdecode(path)} is a safetensors file, but not of a language model "
                         "that lstmcore saved")
    return arrays, metadata
