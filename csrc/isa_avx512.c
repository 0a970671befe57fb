/* isa_avx512.c: the kernels for AVX-512 (F, DQ, BW, VL). */
#define ISA avx512
#define ISA_AVX512
#define TARGET "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"
#include "instances.h"
