/* isa_amx.c: products of bfloat16 and int8 for AVX-512 with AMX. */
#if defined(__clang__) || !defined(__GNUC__) || __GNUC__ >= 11
#define ISA amx
#define ISA_AVX512
#define ISA_VNNI
#define ISA_AMX
#define ONLY_BELOW
#define TARGET "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8"
#include "instances.h"
#endif
