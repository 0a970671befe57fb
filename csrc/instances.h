/* instances.h: body.h once per number format, for the instruction set that the including file names.

   The target is set by pragma, not by compiler flags, so that one flag list builds every file. */

#if defined(ISA_BASE) || (defined(__GNUC__) && ((defined(__x86_64__) && defined(TARGET)) ||         \
                                                (defined(__aarch64__) && defined(ISA_NEON))))

#include <math.h>
#include <stdint.h>
#include <string.h>
#include "lstm.h"

#ifdef TARGET
#define PRAGMA_(x) _Pragma(#x)
#define PRAGMA(x) PRAGMA_(x)
#ifdef __clang__
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
PRAGMA(GCC target(TARGET))
#endif
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#endif

/* A number format: its place in the tables, the suffix of its names, whether it computes in double. */
#define FORMAT FORMAT_FLOAT32
#define F(name) JOIN(name, _f32)
#define DOUBLE 0
#include "body.h"
#undef FORMAT
#undef F
#undef DOUBLE

#define FORMAT FORMAT_FLOAT64
#define F(name) JOIN(name, _f64)
#define DOUBLE 1
#include "body.h"

#define TABLES_(isa) lstm_tables_##isa
#define TABLES(isa) TABLES_(isa)
const lstm_kernels *const TABLES(ISA)[N_FORMATS] = {
    [FORMAT_FLOAT32] = &kernels_f32,
    [FORMAT_FLOAT64] = &kernels_f64,
};

#if defined(TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif
