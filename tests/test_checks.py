"""The checks of arguments by themselves; what public callables do with them is in test_arguments."""

import threading

import numpy as np
import pytest

from lstmcore import checks, scalars


def test_ids_and_lengths_are_copies():
    ids = np.array([[1, 0, 2]])
    got = checks.ids(ids, "tokens", 3)
    lengths = np.array([3, 0])
    longs = checks.lengths(lengths, 3, 2)
    ids[:], lengths[:] = 9, 9
    assert got.tolist() == [[1, 0, 2]] and longs.tolist() == [3, 0]
    for a in got, longs, checks.ids(np.asfortranarray([[1, 0], [2, 0]], ">i2"), "tokens", 3):
        assert a.dtype == np.int64 and a.dtype.isnative and a.flags.carray and a.flags.owndata


def test_empty_lists_are_taken():
    assert checks.lengths([], 5, 0).dtype == np.int64
    assert checks.ids([], "tokens", 3).shape == (0,)
    assert checks.ids([[], []], "tokens", 3).shape == (2, 0)
    with pytest.raises(TypeError, match="tokens must be integers, got float64"):
        checks.ids(np.zeros(0), "tokens", 3)


class Changing:
    """An array-like that shows other numbers every time that it is read."""

    def __init__(self, *values):
        self.values = list(values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values.pop(0), dtype)


def test_what_is_checked_is_what_is_returned():
    for check in (lambda a: checks.ids(a, "tokens", 3), lambda a: checks.lengths(a, 2, 2)):
        assert check(Changing([0, 2], [0, 99])).tolist() == [0, 2]
        with pytest.raises(ValueError):
            check(Changing([0, 99], [0, 2]))


def test_ids_and_lengths_are_in_their_range():
    assert checks.ids([0, 2], "tokens", 3).tolist() == checks.lengths([0, 2], 2, 2).tolist() == [0, 2]
    for wrong in [0, 3], [-1, 2]:
        with pytest.raises(ValueError, match="must be in"):
            checks.ids(wrong, "tokens", 3)
        with pytest.raises(ValueError, match="must be in"):
            checks.lengths(wrong, 2, 2)


def test_a_buffer_refilled_by_another_thread_does_not_get_past_the_check():
    shared, stop = np.zeros(20_000, np.int64), threading.Event()
    large = 59 << 24        # one byte that is not 0: others a copy may meet half-written

    def refill():
        while not stop.is_set():
            shared[-1] = large
            shared[-1] = 0

    thread = threading.Thread(target=refill)
    thread.start()
    try:
        for _ in range(200):
            try:
                assert checks.ids(shared, "tokens", 1).max() == 0
            except ValueError as error:
                assert f"got 0..{large}" in str(error)
    finally:
        stop.set()
        thread.join()


def test_out_is_found_fit():
    room = np.zeros((4, 6))
    assert checks.out("out", room, (4, 6), np.float64, None, np.ones(3)) is room
    assert checks.out("out", room, (4, 6), np.float64, over=room) is room
    assert checks.out("out", room, (4, 6), np.float64, over=room[:]) is room
    assert checks.out("out", room[:2], (2, 6), np.float64, room[2:]) is not None
    strided = np.zeros((4, 2, 6))               # rows beside rows: bounds overlap, numbers do not
    checks.out("out", strided[1, 1], (6,), np.float64, strided[:, 0])
    for other in (room, room[3:], room[:, ::2], room.T, memoryview(room)):
        with pytest.raises(ValueError, match="out must not share memory"):
            checks.out("out", room, (4, 6), np.float64, other)
    for over in room[1:], room[::-1]:
        with pytest.raises(ValueError, match="out must not share memory"):
            checks.out("out", room[:len(over)], over.shape, np.float64, over=over)


@pytest.mark.parametrize("make, error, words", [
    (lambda: [0.0] * 4, TypeError, "out must be a NumPy array, got list"),
    (lambda: np.zeros(4, ">f8"), TypeError, "out must be float64, got >f8"),
    (lambda: np.zeros(4, "f4"), TypeError, "out must be float64, got float32"),
    (lambda: np.zeros((4, 1)), ValueError, r"out must be \(4,\), got \(4, 1\)"),
    (lambda: np.zeros(8)[::2], ValueError, "out must be C-contiguous"),
    (lambda: np.frombuffer(bytes(32)), ValueError, "out must be writable"),
    (lambda: np.zeros(33, "i1")[1:].view(float), ValueError, "out must be aligned"),
    (lambda: np.ma.zeros(4), TypeError, "out must be an array without a mask")])
def test_out_that_is_not_fit_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        checks.out("out", make(), (4,), np.float64)


def test_out_refuses_a_file_that_is_read_only(tmp_path):
    np.zeros(4).tofile(tmp_path / "four.bin")
    with pytest.raises(ValueError, match="out must be writable"):
        checks.out("out", np.memmap(tmp_path / "four.bin", float, "r"), (4,), np.float64)


def test_arrays_are_taken_as_they_are_or_copied_to_fit():
    a = np.arange(6.0).reshape(2, 3)
    frozen = np.frombuffer(a.tobytes()).reshape(2, 3)
    for same in a, frozen:
        assert checks.array(same, "W", "(2, 3)", (2, 3), checks.F64) is same
    unaligned = np.frombuffer(b"." + a.tobytes(), "i1")[1:].view(float).reshape(2, 3)
    for other in np.asfortranarray(a), np.repeat(a, 2, axis=0)[::2], unaligned:
        got = checks.array(other, "W", "(2, 3)", (2, 3), checks.F64)
        assert (got == a).all() and got.flags.c_contiguous and got.flags.aligned
        assert not np.shares_memory(got, other)
    assert checks.optional(None, "W", "(2, 3)", (2, 3), checks.F64) is None


def test_masks_are_found_in_lists():
    for value in [np.zeros(3), np.ma.zeros(3)], (1, np.ma.masked), np.ma.zeros(()):
        with pytest.raises(TypeError, match="X must be an array without a mask"):
            checks.unmasked("X", value)
    for value in None, [1, 2], "text", np.zeros(3), [np.zeros(3)]:
        assert checks.unmasked("X", value) is value


def test_float_dtype_is_one_of_two_objects():
    assert scalars.float_dtype("f8") is checks.F64
    assert scalars.float_dtype(np.dtype("f4", metadata={"from": "a file"})) is checks.F32
    for dtype in ">f4", "f2", None, int:
        with pytest.raises(TypeError, match="dtype must be 'float32' or 'float64'"):
            scalars.float_dtype(dtype)
