/* isa_avx2.c: the kernels for AVX2 with FMA. */
#define ISA avx2
#define ISA_AVX2
#define TARGET "avx2,fma"
#include "instances.h"
