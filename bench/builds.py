"""Builds of revisions, each in a folder of its own: what bench.gate and bench.bits compare."""

import io
import subprocess
import sys
import tarfile

from bench.worker import ROOT, Failure


def build(revision, folder):
    """Build a git revision, or the working tree if it is "", and return where it is installed."""
    source, installed = folder / "source", folder / "installed"
    source.mkdir(parents=True)
    try:
        _export(revision, source)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                        "--no-build-isolation", "--target", str(installed), str(source)],
                       check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout or b"")
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        raise Failure(f"{revision or 'the working tree'} does not build:\n{output.strip()}") from None
    return installed


def _export(revision, folder):
    """The files of a revision, or of the working tree, in `folder`."""
    git = ["git", "-C", str(ROOT)]
    if revision:
        archive = subprocess.run([*git, "archive", revision], check=True, capture_output=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        return
    listed = subprocess.run([*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
