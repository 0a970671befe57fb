"""Zip archives that are only ever looked into: members by name, nothing is unpacked to disk.

PyTorch and Keras store their members uncompressed. Here that is required of those that are read: a
member is then never larger than the file, and all of them together are not either, so no archive
can be a bomb.
"""

import contextlib
import os
import struct
import zipfile
import zlib

from lstmcore.formats import disk

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError,
            RuntimeError, OverflowError, IndexError, OSError)

class Archive:
    """The members of a zip file: `members` (their names) and `read(name)`; a context manager."""

    def __init__(self, path):
        self.path = os.fsdecode(path)
        self._open = contextlib.ExitStack()
        file = self._open.enter_context(disk.opened(path))
        self._size = os.fstat(file.fileno()).st_size
        try:
            with self._complaining():
                self._zip = zipfile.ZipFile(file)
            self.members = self._checked()
        except ValueError:
            self._open.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._zip.close()
        self._open.close()

    def read(self, name):
        """The bytes of a member, its checksum verified."""
        if name not in self.members:
            raise ValueError(f"{self.path}: the member {name!r:.100} is missing")
        if self.members[name].compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{self.path}: the member {name!r:.100} is compressed; PyTorch and "
                             "Keras store members as they are")
        with self._complaining():
            return self._zip.read(self.members[name])

    def _checked(self):
        members, total = {}, 0
        for entry in self._zip.infolist():
            name = entry.filename
            stored = entry.compress_type == zipfile.ZIP_STORED
            if stored and entry.file_size != entry.compress_size:
                raise ValueError(f"{self.path}: the member {name!r:.100} is of {entry.file_size} "
                                 f"and of {entry.compress_size} bytes")
            if entry.flag_bits & 0x1:
                raise ValueError(f"{self.path}: the member {name!r:.100} is encrypted")
            if name in members:
                raise ValueError(f"{self.path}: the member {name!r:.100} appears twice")
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise ValueError(f"{self.path}: the member {name!r:.100} points out of the archive")
            members[name] = entry
            total += entry.file_size if stored else 0
        if total > self._size:
            raise ValueError(f"{self.path}: the members claim {total} bytes, more than the file")
        return members

    @contextlib.contextmanager
    def _complaining(self):
        """Whatever zipfile raises on a damaged archive, as ValueError."""
        try:
            yield
        except _DAMAGED as error:
            raise ValueError(f"{self.path} is a damaged zip archive: {error}") from None
