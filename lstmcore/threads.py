"""How many threads a call uses, and holding BLAS to one while our own threads call it.

The number is resolved as: argument > `threads` context > `set_num_threads` > LSTMCORE_NUM_THREADS >
OMP_NUM_THREADS (where it is valid: what libgomp passes over, so do we) > the CPUs that affinity and
the cgroups' quotas leave to this process.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator

MOST = 1024         # threads, more than any machine has use for

_local = threading.local()
_default: int | None = None


def _positive(n, name):
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an int >= 1, got {n!r}")
    if not 1 <= n.__index__() <= MOST:
        raise ValueError(f"{name} must be in 1..{MOST}, got {n}")
    return n.__index__()


def _number(text):
    """The integer >= 0 that a text says, of any length, as a float; None if it says something else."""
    text = text.strip().removeprefix("+")
    return float(text) if text.isascii() and text.isdigit() else None


def _from_environment():
    text = os.environ.get("LSTMCORE_NUM_THREADS", "").strip()
    if text:
        n = _number(text)
        if not n:
            raise ValueError(f"LSTMCORE_NUM_THREADS must be an integer >= 1, got {text!r}")
        return int(min(n, MOST))
    levels = [_number(text) for text in os.environ.get("OMP_NUM_THREADS", "").split(",")]
    if all(n and n < 2 ** 63 for n in levels):
        return int(min(levels[0], MOST))
    return cpus()


def cpus() -> int:
    """How many CPUs affinity and quota leave to this process."""
    if hasattr(os, "sched_getaffinity"):
        n = len(os.sched_getaffinity(0))
    else:
        n = os.cpu_count() or 1
    return min([n, *_quotas(_read("/proc/self/cgroup"), _read("/proc/self/mountinfo"))])


def _quotas(groups, mounts, root="/"):
    """The quotas, in CPUs rounded up, of a process's cgroups and of those above that it sees.

    groups and mounts are the texts of /proc/self/cgroup and /proc/self/mountinfo; root is where the
    mount points are found.
    """
    mount = re.compile(r"^\S+ \S+ \S+ (\S+) (\S+) .*- (cgroup2?) \S* (\S+)$", re.MULTILINE)
    for top, point, kind, options in mount.findall(mounts):
        controller = "" if kind == "cgroup2" else "cpu"
        if controller and controller not in options.split(","):
            continue
        for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", groups, re.MULTILINE):
            if controller in controllers.split(","):
                folder = os.path.join(root, _plain(point)[1:])
                yield from _quotas_up(folder, _below(path, _plain(top)))


def _plain(path):
    """A path of mountinfo, which writes blanks and the like in octal."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def _below(path, top):
    """path from top on; "" where it is not below: a container that sees its own group as the root."""
    inside = path == top or path.startswith(top.rstrip("/") + "/")
    return path[len(top):].strip("/") if inside and ".." not in path.split("/") else ""


def _quotas_up(mount, path):
    """The quotas of the group at path and of those above it, up to the mount."""
    names = path.split("/") if path else []
    for depth in range(len(names) + 1):
        folder = os.path.join(mount, *names[:depth])
        limit = _read(os.path.join(folder, "cpu.max")) or " ".join(
            _read(os.path.join(folder, f"cpu.cfs_{what}_us")) for what in ("quota", "period"))
        quota, period = map(_number, (limit.split() + ["", ""])[:2])
        if quota and period:
            yield int(-(-quota // period))


def _read(path):
    """The text of a file, "" where there is none."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def get_num_threads() -> int:
    """The number of threads that a call without n_threads uses.

    >>> import lstmcore
    >>> with lstmcore.threads(1):
    ...     lstmcore.get_num_threads()
    1
    """
    n = getattr(_local, "n", None)
    return _of_process() if n is None else n


def _of_process():
    """The number of threads where no context says another."""
    global _default
    if _default is None:
        _default = _from_environment()
    return _default


def set_num_threads(n: int) -> None:
    """Use n threads (int >= 1) in every later call of this process that does not say otherwise."""
    global _default
    _default = _positive(n, "n")


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Use n threads (int >= 1) for the calls that this Python thread makes inside the context."""
    n, before = _positive(n, "n"), getattr(_local, "n", None)
    _local.n = n
    try:
        yield
    finally:
        _local.n = before


def resolve(n_threads: int | None) -> int:
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
def one_blas_thread() -> Iterator[None]:
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


def look_for_blas() -> None:
    """Look again for BLAS libraries, since one was loaded; if the others are held, so is it."""
    global _pools
    with _lock:
        _pools = None
        if _inside:
            _hold()


def show_pool() -> None:
    """Show our threads to threadpoolctl: `threadpool_info` lists them, `threadpool_limits` limits
    them as `set_num_threads` does. It finds libraries that are loaded: the kernels call this when
    they are."""
    from threadpoolctl import LibController, register

    class Kernels(LibController):
        user_api = internal_api = "lstmcore"
        filename_prefixes = ("_kernels",)
        check_symbols = ("team_run", "lstm_kernels_for")

        def get_num_threads(self):
            return _of_process()

        def set_num_threads(self, num_threads):
            set_num_threads(num_threads)

        def get_version(self):
            import lstmcore
            return lstmcore.__version__

    register(Kernels)


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
