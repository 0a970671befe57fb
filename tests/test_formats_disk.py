"""Whatever ends a save, the old file or the new one is there, whole, and nothing else stays."""

import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lstmcore
from lstmcore.formats import disk, safetensors

ENDINGS = {".safetensors": None, ".onnx": "onnx", ".weights.h5": "h5py"}


@pytest.fixture(params=ENDINGS)
def ending(request):
    if ENDINGS[request.param]:
        pytest.importorskip(ENDINGS[request.param])
    return request.param


def child(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                            **options)


def test_a_save_that_finds_no_room_keeps_the_old_file(tmp_path, ending):
    """As on a full disk, a file can grow to 64 KiB only."""
    path = tmp_path / ("m" + ending)
    lstmcore.LSTM(3, 3, seed=0).save(path)
    before = path.read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    process = child(f"import lstmcore; lstmcore.LSTM(100, 100, seed=0).save({str(path)!r})",
                    preexec_fn=limit)
    said = process.communicate()[1]
    assert process.returncode == 1 and "OSError" in said and repr(str(path)) in said
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_save_that_is_killed_leaves_one_of_the_files(tmp_path, ending):
    path = tmp_path / ("m" + ending)
    code = ("import lstmcore\nms = [lstmcore.LSTM(40, 40 + n, seed=0) for n in range(2)]\n"
            f"ms[0].save({str(path)!r})\nprint(flush=True)\n"
            f"while True:\n    for m in ms: m.save({str(path)!r})")
    rng, left = np.random.default_rng(0), 0
    for _ in range(5):
        process = child(code, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert lstmcore.load(path).hidden_size in (40, 41)
        left += len(list(tmp_path.iterdir())) - 1
    lstmcore.LSTM(3, 3, seed=0).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert left or ending != ".safetensors"         # the kills did come in the middle


def test_writers_at_one_time_do_not_meet(tmp_path):
    path, errors = tmp_path / "m.safetensors", []

    def write(k):
        try:
            for _ in range(50):
                safetensors.write(path, {"a": np.full(20000 * k, k, "f4")})
        except Exception as error:      # a thread's error would be lost
            errors.append(error)
    threads = [threading.Thread(target=write, args=(k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            a = safetensors.read(path)[0]["a"]
            assert (a == a.size // 20000).all()
    assert not errors and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_unfinished_file_of_a_living_writer_stays(tmp_path):
    path = tmp_path / "m"
    with disk.written(path) as first:
        first.write(b"first")
        with disk.written(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second" and len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyError), disk.written(path) as third:
        third.write(b"third")
        raise KeyError
    assert path.read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_names_may_take_all_255_bytes(tmp_path):
    for name in ("n" * 255, "ü" * 121 + ".safetensors"):
        disk.check_writable(tmp_path / name)
        safetensors.write(tmp_path / name, {})
        assert safetensors.read(tmp_path / name) == ({}, {})
    for check in (disk.check_writable, lambda path: safetensors.write(path, {})):
        with pytest.raises(OSError, match="n{256}"):
            check(tmp_path / ("n" * 256))


@pytest.mark.skipif(os.name == "nt", reason="names there are texts")
def test_names_may_be_bytes_that_are_no_text(tmp_path, ending):
    path = os.fsencode(tmp_path) + b"/\xff" + ending.encode()
    lstmcore.LSTM(3, 4, seed=0).save(path)
    assert lstmcore.load(path).hidden_size == 4
    disk.check_writable(path)


def test_links_are_followed_and_modes_kept(tmp_path):
    real, link, dangling = (tmp_path / name for name in ("real", "link", "dangling"))
    real.touch(0o600)
    real.chmod(0o640)
    link.symlink_to("real")
    dangling.symlink_to(tmp_path / "new")
    for path in (link, dangling):
        safetensors.write(path, {"a": np.zeros(3)})
        assert path.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert safetensors.read(real)[0].keys() == safetensors.read(tmp_path / "new")[0].keys() == {"a"}
    umask = os.umask(0o027)
    try:
        safetensors.write(tmp_path / "open", {})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o640


def test_devices_and_pipes_are_written_to_and_not_read(tmp_path, monkeypatch):
    safetensors.write(os.devnull, {"a": np.zeros(3)})
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="/dev/full"):
            safetensors.write("/dev/full", {})
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    safetensors.write(pipe, {"a": np.zeros(30000)})
    reader.join()
    safetensors.write(tmp_path / "file", {"a": np.zeros(30000)})
    assert got == [(tmp_path / "file").read_bytes()] and stat.S_ISFIFO(pipe.stat().st_mode)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path} must be a regular file"):
            lstmcore.load(path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="nobody reads"):
        safetensors.write(pipe, {})


def test_what_cannot_be_written_is_named_at_once(tmp_path):
    for path in (tmp_path, f"{tmp_path}/", tmp_path / "no" / "m", tmp_path / "no" / "no" / "m"):
        for check in (disk.check_writable, lambda path: safetensors.write(path, {})):
            with pytest.raises(OSError) as raised:
                check(path)
            assert raised.value.filename == os.fspath(path)
    assert not list(tmp_path.iterdir())
    if os.geteuid():
        kept = pathlib.Path(tmp_path, "kept")
        kept.touch(0o400)
        with pytest.raises(PermissionError):
            safetensors.write(kept, {})
