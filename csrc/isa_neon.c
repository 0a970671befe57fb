/* isa_neon.c: the kernels for AArch64, where NEON is always there. */
#define ISA neon
#define ISA_NEON
#include "instances.h"
