/* isa_avx512bf16.c: products of bfloat16 for AVX-512 with BF16. */
#define ISA avx512bf16
#define ISA_AVX512
#define ISA_BF16
#define ONLY_BFLOAT16
#define TARGET "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"
#include "instances.h"
