"""Zip archives that are only ever looked into: members by name, nothing is unpacked to disk.

PyTorch and Keras store their members uncompressed. Here that is required: a member is then never
larger than the file, and all of them together are not either, so no archive can be a bomb.
"""

import contextlib
import os
import struct
import zipfile
import zlib

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError,
            RuntimeError, OverflowError, IndexError, OSError)

class Archive:
    """The members of a zip file: `members` (their names) and `read(name)`; a context manager."""

    def __init__(self, path):
        self.path = path
        self._file = open(path, "rb")
        try:
            with self._complaining():
                self._zip = zipfile.ZipFile(self._file)
            self.members = self._checked()
        except ValueError:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._zip.close()
        self._file.close()

    def read(self, name):
        """The bytes of a member, its checksum verified."""
        if name not in self.members:
            raise ValueError(f"{self.path}: the member {name!r:.100} is missing")
        with self._complaining():
            return self._zip.read(self.members[name])

    def _checked(self):
        members, total = {}, 0
        for entry in self._zip.infolist():
            name = entry.filename
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{self.path}: the member {name!r:.100} is compressed; PyTorch "
                                 "and Keras store members as they are")
            if entry.flag_bits & 0x1:
                raise ValueError(f"{self.path}: the member {name!r:.100} is encrypted")
            if name in members:
                raise ValueError(f"{self.path}: the member {name!r:.100} appears twice")
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise ValueError(f"{self.path}: the member {name!r:.100} points out of the archive")
            members[name] = entry
            total += entry.file_size
        if total > os.path.getsize(self.path):
            raise ValueError(f"{self.path}: the members claim {total} bytes, more than the file")
        return members

    @contextlib.contextmanager
    def _complaining(self):
        """Whatever zipfile raises on a damaged archive, as ValueError."""
        try:
            yield
        except _DAMAGED as error:
            raise ValueError(f"{self.path} is a damaged zip archive: {error}") from None
