"""docs/serving.md: its server, taken from the page, under uvicorn, asked by many at once."""

import http.client
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import lstmcore

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="these tests lie apart from docs")


@pytest.fixture(scope="module")
def page():
    """What the example defines."""
    pytest.importorskip("starlette")
    (source,) = re.findall(r"^```python\n(import asyncio\n.*?)^```$", PAGE.read_text("utf-8"),
                           re.M | re.S)
    names = {"__name__": "server"}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def serve():
    """A function that runs an app under uvicorn until the test ends: its port."""
    uvicorn, running = pytest.importorskip("uvicorn"), []

    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="critical"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        for _ in range(1000):
            if server.started:
                return server.servers[0].sockets[0].getsockname()[1]
            thread.join(0.01)
        raise TimeoutError("uvicorn did not start within 10 s")

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


def post(port, body, method="POST"):
    """The status and the body of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, "/", body)
    answer = connection.getresponse()
    got = answer.status, answer.read()
    connection.close()
    return got


def test_many_clients_get_the_bits_that_they_get_alone(page, serve):
    port = serve(page["app"])
    lstm, rng = lstmcore.LSTM(64, 256, seed=0), np.random.default_rng(0)
    sequences = [rng.standard_normal((n, 64), dtype="float32") for n in rng.integers(1, 40, 48)]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda x: post(port, x.tobytes()), sequences))
    for x, (status, body) in zip(sequences, answers):
        assert status == 200
        assert body == lstm(x[:, None])[1][0][-1, 0].tobytes()


def test_what_waits_is_one_batch(page, serve):
    sizes, go, begun = [], threading.Event(), threading.Event()

    def answer(sequences):
        sizes.append(len(sequences))
        begun.set()
        assert go.wait(30)
        return [x.sum(axis=0) for x in sequences]

    port, x = serve(page["application"](answer)), np.ones((3, 64), "<f4")
    with ThreadPoolExecutor(70) as clients:
        first = clients.submit(post, port, x.tobytes())
        assert begun.wait(30)
        others = [clients.submit(post, port, x.tobytes()) for _ in range(69)]
        while any(not other.running() for other in others):
            pass
        go.wait(1)      # for the requests to arrive
        go.set()
        assert {each.result() for each in (first, *others)} == {
            (200, np.full(64, 3, "<f4").tobytes())}
    assert sizes[0] == 1 and sum(sizes) == 70 and max(sizes) == page["MOST_REQUESTS"]


def test_bad_requests_are_told_and_harm_no_others(page, serve):
    calls = []

    def answer(sequences):
        calls.append(len(sequences))
        if np.isnan(sequences[0]).any():
            raise ValueError("nan")
        return [x[-1] for x in sequences]

    port = serve(page["application"](answer))
    for body, got in ((b"", 0), (b"1234", 4), (bytes(4 * 64 + 1), 257)):
        assert post(port, body) == (
            400, b"the body must be float32 (n, 64), n >= 1, got %d bytes" % got)
    assert post(port, bytes(4 * 64 * 1001)) == (413, b"more than 1000 steps")
    assert post(port, None, "GET")[0] == 405
    assert not calls
    assert post(port, np.full((1, 64), np.nan, "<f4").tobytes())[0] == 500
    assert post(port, bytes(4 * 64 * 1000)) == (200, bytes(4 * 64))
