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
#endif
#if defined(__x86_64__) && defined(TARGET)
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#elif defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

/* A number format: its name, the suffix of its names, its products, whether it computes in double, and
   whether it is one below float32: then every instruction set has the same bits.  An instruction set that
   adds but some formats to another one has said which, by ONLY_... */
#if !defined(ONLY_BELOW) && !defined(ONLY_BFLOAT16) && !defined(ONLY_INT8)
#define ALL_FORMATS
#endif
#define BELOW 0
#define PRODUCTS "format_float.h"
#ifdef ALL_FORMATS
#define FORMAT "float32"
#define F(name) JOIN(name, _f32)
#define DOUBLE 0
#include "body.h"
#undef FORMAT
#undef F
#undef DOUBLE

#define FORMAT "float64"
#define F(name) JOIN(name, _f64)
#define DOUBLE 1
#include "body.h"
#undef FORMAT
#undef F
#undef DOUBLE
#define FLOAT_TABLES &kernels_f32, &kernels_f64,
#else
#define FLOAT_TABLES
#endif
#undef BELOW
#undef PRODUCTS

#define BELOW 1
#define DOUBLE 0
#ifndef ONLY_INT8
#define FORMAT "bfloat16"
#define F(name) JOIN(name, _bf16)
#define PRODUCTS "format_bfloat16.h"
#include "body.h"
#undef FORMAT
#undef F
#undef PRODUCTS
#define BFLOAT16_TABLE &kernels_bf16,
#else
#define BFLOAT16_TABLE
#endif

#ifndef ONLY_BFLOAT16
#define FORMAT "int8"
#define F(name) JOIN(name, _i8)
#define PRODUCTS "format_int8.h"
#include "body.h"
#define INT8_TABLE &kernels_i8,
#else
#define INT8_TABLE
#endif

#define TABLES_(isa) lstm_tables_##isa
#define TABLES(isa) TABLES_(isa)
const lstm_kernels *const TABLES(ISA)[] = {FLOAT_TABLES BFLOAT16_TABLE INT8_TABLE NULL};

#if defined(TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif
