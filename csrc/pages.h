/* pages.h: memory in huge pages, where the system has them for whoever asks.

   More than 8 MB are more pages of 4 KB than a CPU keeps the addresses of: training is 5 to 7 % faster at
   (50,128,1024,1024).  Less gains nothing: weights of 2 MB in one huge page were 0 to
   50 % slower to read, those of a stream of 256 units in float32. */

#ifndef LSTMCORE_PAGES_H
#define LSTMCORE_PAGES_H

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* malloc, also to be freed by free. */
static inline void *pages_malloc(size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const size_t huge = 2 << 20, many = 8 << 20;
    void *p;
    if (size >= many && posix_memalign(&p, huge, size) == 0) {
        madvise(p, size / huge * huge, MADV_HUGEPAGE);  /* a wish */
        return p;
    }
#endif
    return malloc(size);
}

#endif
