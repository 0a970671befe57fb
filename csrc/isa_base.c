/* isa_base.c: the kernels for any CPU: 16-byte vectors as far as the compiler has them. */
#define ISA base
#define ISA_BASE
#include "instances.h"
