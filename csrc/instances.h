/* instances.h: body.h twice, float and double, for the instruction set that the including file names.

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

#define DOUBLE 0
#include "body.h"
#undef DOUBLE
#define DOUBLE 1
#include "body.h"

#define TABLE_(isa) lstm_table_##isa
#define TABLE(isa) TABLE_(isa)
const lstm_kernels *const TABLE(ISA)[2] = {&kernels_f32, &kernels_f64};

#if defined(TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif
