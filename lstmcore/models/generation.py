"""Text from a language model: drawing token after token, and beam search.

Knows a network that maps tokens (T, B) and a state to logits and a state, and a vocabulary.
"""

import warnings

import numpy as np

from lstmcore import scalars


def drawing(temperature=1.0, top_k=None, top_p=None, seed=None):
    """A function from logits (V,) to the id of a token drawn from them.

    >>> drawing(temperature=0)(np.array([0.1, 3.0, 2.0]))
    1
    """
    scalars.number("temperature", temperature)
    if top_k is not None:
        scalars.size("top_k", top_k)
    if top_p is not None and not 0 < scalars.number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    rng = np.random.default_rng(None if seed is None else scalars.size("seed", seed, at_least=0))

    def draw(logits):
        z = logits.astype(np.float64)
        best = int(z.argmax())
        if temperature == 0:
            return best
        p = np.exp((z - z[best]) / temperature)
        order = np.argsort(-p, kind="stable")[:top_k]
        p = p[order]
        p /= p.sum()
        cumulative = p.cumsum()
        if top_p is not None:
            kept = np.searchsorted(cumulative, top_p) + 1
            order, cumulative = order[:kept], cumulative[:kept]
        at = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        return int(order[min(at, len(order) - 1)])
    return draw


def ids_of(vocabulary, prime):
    """The ids of a text to go on from; what the model has never seen is read as another, and named."""
    if not isinstance(prime, str):
        raise TypeError(f"prime must be a str, got {type(prime).__name__}")
    ids, replaced = vocabulary.read(prime)
    if replaced:
        few = ", ".join(f"{token!r} read as {'unknown' if other is None else repr(other)}"
                        for token, other in list(replaced.items())[:8])
        warnings.warn("the text to go on from has what the training text did not have: "
                      f"{few}{', ...' if len(replaced) > 8 else ''}", stacklevel=3)
    return ids


class Writer:
    """A network that has read a text, and goes on writing it."""

    def __init__(self, network, vocabulary):
        self.network, self.vocabulary = network, vocabulary
        self._step = self._logits = self._unread = None
        self._after = False             # whether the line that it is in has begun

    def read(self, ids):
        """Read ids (N,), after what it has read and written so far; at first none is a line end."""
        if len(ids):
            self._after = self.vocabulary.decode(ids[-1:]) != "\n"
        if self._step is None:
            self._logits, state = _read(self.network, self.vocabulary, ids)
            self._step = self.network.reader(state)
            return
        for token in ids:
            self._take(token)

    def write(self, length, draw, stop):
        """The text of `length` drawn tokens, in pieces as they come."""
        decode, tail = self.vocabulary.decoder(self._after), ""
        longest = max(map(len, stop), default=0)
        for _ in range(length):
            self._catch_up()
            token = self._unread = draw(self._logits)
            if piece := decode(token):
                cut = _stopped(tail, piece, stop)
                self._after = not piece.endswith("\n")
                yield piece[:cut]
                if cut is not None:
                    return
                tail = (tail + piece)[-longest:] if longest else ""
        if piece := decode(None):
            yield piece

    def _take(self, token):
        self._catch_up()
        self._logits = _without_unknown(self._step(int(token)), self.vocabulary)

    def _catch_up(self):
        """Read the token that was written last, which needs no reading if nothing follows."""
        if self._unread is not None:
            token, self._unread = self._unread, None
            self._take(token)


def beam_search(network, vocabulary, prime, length, width, stop):
    """The best text found when only the `width` likeliest beginnings are followed."""
    logits, state = _read(network, vocabulary, prime)
    after = len(prime) > 0 and vocabulary.decode(prime[-1:]) != "\n"
    scores, beams, ended = np.zeros(1), np.zeros((1, 0), np.int64), []
    for n in range(length):
        if n:
            logits, state = network(beams[:, -1:].T, state)
            logits = _without_unknown(logits[0], vocabulary)
        total = scores[:, None] + _log_softmax(np.atleast_2d(logits))
        best = np.argsort(-total, axis=None, kind="stable")[:width]
        best = best[np.isfinite(total.flat[best])]
        rows, tokens = np.unravel_index(best, total.shape)
        scores, beams = total.flat[best], np.column_stack([beams[rows], tokens])
        if stop:
            texts = [vocabulary.decode(beam, after) for beam in beams]
            over = np.array([any(s in t for s in stop) for t in texts])
            ended += [(score / (n + 1), t) for score, t, o in zip(scores, texts, over) if o]
            scores, beams, rows = scores[~over], beams[~over], rows[~over]
            if not len(beams):
                break
        state = tuple(part[:, rows] for part in state) if isinstance(state, tuple) \
            else state[:, rows]
    ended += [(score / max(1, length), vocabulary.decode(beam, after))
              for score, beam in zip(scores, beams)]
    return max(ended, key=lambda pair: pair[0])[1]


def check_stop(stop):
    """The strings that end a text, as a tuple."""
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop must be a str, or several, none of them empty, got {stop!r}")
    return stop


def _read(network, vocabulary, prime):
    """Logits after `prime`, or after the vocabulary's start, and the state then."""
    tokens = prime if len(prime) else np.array([vocabulary.start])
    logits, state = network(tokens[:, None])
    return _without_unknown(logits[-1, 0], vocabulary), state


def _without_unknown(logits, vocabulary):
    """Logits (..., V) that never lead to the token for the unknown."""
    if vocabulary.unknown is not None and logits.shape[-1] > 1:
        logits[..., vocabulary.unknown] = -np.inf
    return logits


def _log_softmax(logits):
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _stopped(tail, piece, stop):
    """Where in `piece` the first stop string ends that appears in tail + piece, or None."""
    whole = tail + piece
    ends = [at + len(s) - len(tail) for s in stop if (at := whole.find(s)) >= 0]
    return min((end for end in ends if end > 0), default=None)
