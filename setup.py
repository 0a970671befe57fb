"""Builds the extension modules; everything else is in pyproject.toml.

LSTMCORE_NO_OPENMP=1 builds without OpenMP (one thread), as does a compiler that has none.
"""

import os
import tempfile
from pathlib import Path

import Cython
import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# No contraction: a multiply and an add are fused only where the code says so. No debug information,
# which would be over half of the wheel. MSVC has no vector types: its build runs over BLAS.
GNU = ["-O3", "-g0", "-ffp-contract=off", "-std=gnu11"]
FLAGS = {"unix": GNU, "mingw32": GNU, "msvc": ["/O2", "/std:c11", "/fp:precise", "/utf-8"]}


def files(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


class BuildExt(build_ext):
    """Finds out what the compiler is and whether it has OpenMP."""

    def build_extensions(self):
        kind = self.compiler.compiler_type
        if kind not in FLAGS:
            raise SystemExit(f"lstmcore is built by {', '.join(FLAGS)}, got the compiler {kind!r}")
        compile_args, openmp = FLAGS[kind], ["-fopenmp"] if kind == "unix" and self.has_openmp() else []
        for extension in self.extensions:
            extension.extra_compile_args += compile_args + openmp
            extension.extra_link_args += openmp
        self.parallel = os.cpu_count()
        super().build_extensions()

    def has_openmp(self):
        if os.environ.get("LSTMCORE_NO_OPENMP", "0") not in ("", "0"):
            return False
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "probe.c")
            source.write_text("#include <omp.h>\nint main(void) { return omp_get_num_threads() < 0; }")
            try:
                objects = self.compiler.compile([str(source)], scratch, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, str(Path(scratch, "probe")),
                                              extra_postargs=["-fopenmp"])
            except Exception:  # the compilers' errors have no common base
                return False
        return True


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize([
        Extension(f"lstmcore.{Path(source).stem}",
                  # one module holds the C kernels; the others reach them through it
                  [source, *(files("csrc/*.c") if source == "lstmcore/_kernels.pyx" else [])],
                  depends=files("csrc/*.h") + files("lstmcore/*.pxd"),
                  include_dirs=["csrc", numpy.get_include()],
                  define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")])
        for source in files("lstmcore/*.pyx")
    # What Cython writes depends on NumPy's headers: another environment must not find it here.
    ], build_dir=f"build/cython-{Cython.__version__}-numpy-{numpy.__version__}"),
)
