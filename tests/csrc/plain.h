/* plain.h: included first, makes GCC compile csrc as a compiler without vector types does (MSVC). */
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#undef __GNUC__
#undef __x86_64__
#undef __aarch64__
