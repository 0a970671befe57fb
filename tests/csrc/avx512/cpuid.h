/* cpuid.h: stands before the compiler's own beside this folder's immintrin.h, and answers csrc/dispatch.c
   that the CPU has AVX-VNNI. */

#include_next <cpuid.h>

#ifndef EMULATED_CPUID
#define EMULATED_CPUID

static inline int emulated_cpuid(unsigned *a) {
    *a = 1u << 4;
    return 1;
}
#define __get_cpuid_count(leaf, part, a, b, c, d) ((void)(b), (void)(c), (void)(d), emulated_cpuid(a))

#endif
