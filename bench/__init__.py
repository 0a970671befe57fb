"""Benchmarks: the cases, our own measurements, the comparison with other libraries, the gate.

    pytest bench                       lstmcore on every case, verified, then timed
    pytest bench --benchmark-disable   the same, verified only, on shortened cases
    python -m bench.roofline           what this machine can do: peaks of products, bandwidths
    python -m bench.compare            lstmcore against torch, ONNX Runtime, OpenVINO and others
    python -m bench.serving            requests per second of docs/serving.md's app, beside torch
    python -m bench.pages              the tables of README and docs, from the records
    python -m bench.gate BASE HEAD     is HEAD slower than BASE? Exit code 1 says yes
    python -m bench.bits BASE HEAD     do they compute the same bits? Exit code 1 says no

Every module's docstring says what its numbers mean. Nothing here is part of the installed package.
"""
