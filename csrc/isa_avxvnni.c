/* isa_avxvnni.c: products of int8 for AVX2 with AVX-VNNI. */
#define ISA avxvnni
#define ISA_AVX2
#define ISA_VNNI
#define ONLY_INT8
#define TARGET "avx2,fma,avxvnni"
#include "instances.h"
