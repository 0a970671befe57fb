"""Files on the disk: read as a whole, written as a whole or not at all.

`written` makes a new file beside the target, with a name that nobody can guess, brings it onto the
disk and puts it in the target's place in one step: whatever ends the process, the old file or the
new one is there. What an ended process left behind, the next writer of the same target removes; a
lock on each unfinished file, which ends with its process, tells it from one that is being written.
"""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
import time

try:
    import fcntl
except ImportError:                     # Windows: a file that is open there cannot be removed
    fcntl = None

_END = ".partial"


@contextlib.contextmanager
def opened(path):
    """A regular file, open for reading; a pipe or device, which may never end, is a ValueError."""
    # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{os.fspath(path)} must be a regular file, got a pipe or device")
        yield file


def read(path):
    """The bytes of a regular file."""
    with opened(path) as file:
        return file.read()


@contextlib.contextmanager
def written(path):
    """A binary file to write to, which takes the place of `path` when the block ends without error.

    Links are followed, and a file that is replaced leaves its mode to the new one. A pipe or device
    is written to. An OSError names `path`.
    """
    with _naming(path):
        if _is_special(path):
            buffer = io.BytesIO()
            yield buffer
            with open(path, "wb", buffering=0, opener=_open_special) as file:
                left = buffer.getbuffer()
                while left:
                    left = left[file.write(left):]
            return
        target = os.path.realpath(os.fsdecode(path))
        partial, descriptor = _new_partial(target)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())     # on the disk before it takes the place of another
                if fcntl is None:
                    file.close()
                os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise
        _sync_folder(target)


def check_writable(path):
    """OSError or ValueError unless `written` can write here; a file that is there stays as is."""
    with _naming(path):
        if _is_special(path):
            return
        partial, descriptor = _new_partial(os.path.realpath(os.fsdecode(path)))
        os.close(descriptor)
        os.remove(partial)


def _is_special(path):
    """Whether something other than a file is there; OSError for a directory, or a name too long."""
    name = os.fsdecode(path)
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode) or not os.path.basename(name):
        raise IsADirectoryError(errno.EISDIR, "is a directory")
    if not stat.S_ISREG(mode):
        return True
    if os.path.exists(name) and not os.access(name, os.W_OK):
        raise PermissionError(errno.EACCES, "is not writable")
    return False


def _open_special(path, flags):
    """A device, or a pipe that somebody reads from within 10 s: nobody is helped by more."""
    for _ in range(100):
        try:
            descriptor = os.open(path, flags & ~os.O_CREAT | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.1)
        else:
            os.set_blocking(descriptor, True)
            return descriptor
    raise OSError(errno.ENXIO, "nobody reads from this pipe")


def _new_partial(target):
    """A new file beside the target: its path, and its descriptor, locked; others' leftovers go."""
    folder, name = os.path.split(target)
    # Of a fixed length, as the target's own name may have all the 255 bytes that a name can have.
    start = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}."
    for entry in os.scandir(folder):
        if entry.name.startswith(start) and entry.name.endswith(_END):
            _remove_if_left(entry.path)
    try:
        old = os.stat(target)
    except FileNotFoundError:
        old = None
    while True:
        partial = os.path.join(folder, f"{start}{secrets.token_hex(8)}{_END}")
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY
                             | getattr(os, "O_BINARY", 0), 0o666 if old is None else 0o600)
        # Between its making and its locking, another writer may have taken it for a leftover.
        if not _locked(descriptor, wait=True) or os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)
    if old is not None and hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):          # only an administrator gives files away
            os.fchown(descriptor, old.st_uid, old.st_gid)
        with contextlib.suppress(OSError):          # file systems without modes
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    return partial, descriptor


def _remove_if_left(partial):
    with contextlib.suppress(OSError):
        if fcntl is None:
            os.remove(partial)
            return
        descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _locked(descriptor):
                os.remove(partial)
        finally:
            os.close(descriptor)


def _locked(descriptor, wait=False):
    """Whether the open file is now locked by this writer; unless it waits, no other may have it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (AttributeError, OSError):               # no fcntl, or no locks on this file system
        return False
    return True


def _sync_folder(target):
    with contextlib.suppress(OSError):              # Windows opens no folders
        descriptor = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _naming(path):
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), os.fspath(path)) from None
