"""How many threads a call uses, and holding BLAS to one while our own threads call it.

The number is resolved as: argument > `threads` context > `set_num_threads` > LSTMCORE_NUM_THREADS >
OMP_NUM_THREADS > the CPUs that this process may run on.
"""

import contextlib
import os
import threading

MOST = 1024         # threads, more than any machine has use for

_local = threading.local()
_default = None


def _positive(n, name):
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an int >= 1, got {n!r}")
    if not 1 <= n.__index__() <= MOST:
        raise ValueError(f"{name} must be in 1..{MOST}, got {n}")
    return n.__index__()


def _from_environment():
    for name in ("LSTMCORE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").split(",")[0].strip()
        if text:
            if not text.isdigit() or int(text) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {text!r}")
            return min(int(text), MOST)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def get_num_threads():
    """The number of threads that a call without n_threads uses.

    >>> import lstmcore
    >>> with lstmcore.threads(1):
    ...     lstmcore.get_num_threads()
    1
    """
    global _default
    n = getattr(_local, "n", None)
    if n is None:
        if _default is None:
            _default = _from_environment()
        n = _default
    return n


def set_num_threads(n):
    """Use n threads (int >= 1) in every later call of this process that does not say otherwise."""
    global _default
    _default = _positive(n, "n")


@contextlib.contextmanager
def threads(n):
    """Use n threads (int >= 1) for the calls that this Python thread makes inside the context."""
    n, before = _positive(n, "n"), getattr(_local, "n", None)
    _local.n = n
    try:
        yield
    finally:
        _local.n = before


def resolve(n_threads):
    """n_threads as the argument of a public function: None or an int >= 1."""
    return get_num_threads() if n_threads is None else _positive(n_threads, "n_threads")


_lock = threading.Lock()
_inside = {}        # thread -> how many of its calls hold BLAS to one thread now
_pools = None       # BLAS libraries; finding them costs milliseconds: at the first use, not at import
_before = {}        # library -> its number of threads before it was held


def _limit(pool, n):
    """Set the threads of a BLAS pool from any Python thread.

    threadpoolctl's set_num_threads does nothing, since 3.7, on every thread but the first that used
    it, because two threads might undo each other's limits; here the lock and the count see to that.
    """
    getattr(pool, "_real_set_num_threads", pool.set_num_threads)(n)


def _hold():
    global _pools
    if _pools is None:
        from threadpoolctl import ThreadpoolController

        _pools = ThreadpoolController().select(user_api="blas").lib_controllers
    for pool in _pools:
        if pool.filepath not in _before:
            _before[pool.filepath] = pool.num_threads
            _limit(pool, 1)


def _release():
    for pool in _pools:
        if pool.filepath in _before:
            _limit(pool, _before.pop(pool.filepath))


@contextlib.contextmanager
def one_blas_thread():
    """Hold every BLAS pool of the process to one thread; the last of concurrent callers restores."""
    me = threading.get_ident()
    with _lock:
        if not _inside:
            _hold()
        _inside[me] = _inside.get(me, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _inside[me] -= 1
            if not _inside[me]:
                del _inside[me]
            if not _inside:
                _release()


def look_for_blas():
    """Look again for BLAS libraries, since one was loaded; if the others are held, so is it."""
    global _pools
    with _lock:
        _pools = None
        if _inside:
            _hold()


def _after_fork():
    """In the child only the thread that forked goes on; what the others held is free again."""
    global _lock
    _lock = threading.Lock()
    for thread in set(_inside) - {threading.get_ident()}:
        del _inside[thread]
    if _before and not _inside:
        _release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
