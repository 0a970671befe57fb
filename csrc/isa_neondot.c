/* isa_neondot.c: products of int8 for AArch64 with the dot product of bytes. */
#define ISA neondot
#define ISA_NEON
#define ISA_NEON_DOT
#define ONLY_INT8
#if defined(__aarch64__) && defined(__clang__)
#define TARGET "dotprod"
#elif defined(__aarch64__)
#define TARGET "arch=armv8.2-a+dotprod"
#endif
#include "instances.h"
