/* isa_avx512vnni.c: products of int8 for AVX-512 with VNNI. */
#define ISA avx512vnni
#define ISA_AVX512
#define ISA_VNNI
#define ONLY_INT8
#define TARGET "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni"
#include "instances.h"
