"""What this machine can do, in seconds: `python -m bench.roofline`.

Prints, for one thread and for all: the peak of fused multiply-adds (GFLOP/s) per instruction set
and dtype, of dot products in int8, int16 and bfloat16 (1e9 operations/s, two a product, "absent"
where the CPU lacks the instruction), the read bandwidth (GB/s, all threads together, each reading
its own data) from L2, L3 and memory, and what a spin barrier and an empty OpenMP region cost
(nanoseconds). With these a case's lower bound is max(FLOPs / peak, weight bytes / bandwidth) +
steps x barrier.

`measure(threads)` gives the same as a dict, None for what is absent. The probe is
roofline.c, compiled on demand with the system's compiler (CC, else gcc) and OpenMP; it shares no
code with the kernels.
"""

import argparse
import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("roofline.c")
ROWS = (  # prefix of the probe's names, unit
    ("fma_", "GFLOP/s"), ("dot_", "Gop/s"), ("read_", "GB/s"), ("barrier_ns", "ns"),
    ("region_ns", "ns"))


def cache_bytes():
    """The sizes of one core's L2 and of the L3, from sysfs, else the usual 1 MB and 32 MB."""
    sizes = {2: 1 << 20, 3: 32 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, size = (int((index / "level").read_text()), (index / "size").read_text().strip())
        if level in sizes:
            sizes[level] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return sizes[2], sizes[3]


@functools.lru_cache
def measure(threads):
    """The probe's figures by name: fma_avx2_f32, read_l2, barrier_ns and so on."""
    with tempfile.TemporaryDirectory() as folder:
        probe = str(Path(folder, "roofline"))
        compiler = os.environ.get("CC", "gcc")
        subprocess.run([compiler, "-O3", "-fopenmp", "-o", probe, SOURCE], check=True)
        output = subprocess.run([probe, str(threads), *map(str, cache_bytes())], check=True,
                                capture_output=True, text=True).stdout
    return {name: None if value == "absent" else float(value)
            for name, value in map(str.split, output.splitlines())}


def peak_gflops(threads, precision):
    """The highest peak over the instruction sets: of FMA for "float32" and "float64"; for
    "bfloat16" and "int8" of all that computes their products exactly, which dot_int8_avx2 does not:
    it saturates."""
    exact = {"float32": r"fma_.*_f32", "float64": r"fma_.*_f64",
             "bfloat16": r"fma_.*_f32|dot_bf16_.*",
             "int8": r"fma_.*_f32|dot_int16_.*|dot_int8_(?!avx2$).*"}[precision]
    return max(value for name, value in measure(threads).items()
               if value and re.fullmatch(exact, name))


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline",
                                     description="Measure what this machine can do.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                        help="threads of the second column (default: all)")
    threads = sorted({1, parser.parse_args(argv).threads})
    l2, l3 = cache_bytes()
    print(f"caches: L2 {l2 >> 10} KB per core, L3 {l3 >> 20} MB")
    print(f"{'':20}" + "".join(f"{n:>8} thread{'s' * (n > 1)}" for n in threads))
    for name in measure(1):
        unit = next(unit for prefix, unit in ROWS if name.startswith(prefix))
        found = {n: measure(n)[name] for n in threads}
        values = "".join(f"{'absent' if value is None else format(value, '.0f'):>{15 + (n > 1)}}"
                         for n, value in found.items())
        print(f"{name.removesuffix('_ns'):20}{values}  {unit}")


if __name__ == "__main__":
    main()
