/* dispatch.c: the one place that knows which instruction sets exist. */

#include <string.h>
#include "lstm.h"
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

extern const lstm_kernels *const lstm_table_base[2];

#if defined(__GNUC__) && defined(__x86_64__)
extern const lstm_kernels *const lstm_table_avx2[2], *const lstm_table_avx512[2];
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#elif defined(__GNUC__) && defined(__aarch64__)
extern const lstm_kernels *const lstm_table_neon[2];
#endif
static int always(void) { return 1; }

static const struct {
    const char *isa;
    int (*runs_here)(void);
    const lstm_kernels *const *table;
} known[] = {
#if defined(__GNUC__) && defined(__x86_64__)
    {"avx512", has_avx512, lstm_table_avx512},
    {"avx2", has_avx2, lstm_table_avx2},
#elif defined(__GNUC__) && defined(__aarch64__)
    {"neon", always, lstm_table_neon},
#endif
    {"base", always, lstm_table_base},
};
enum { N_KNOWN = sizeof known / sizeof known[0] };

const char *lstm_isa(int k) {
    for (int q = 0; q < N_KNOWN; q++)
        if (known[q].runs_here() && k-- == 0) return known[q].isa;
    return NULL;
}

const lstm_kernels *lstm_kernels_for(const char *isa, int is_double) {
    for (int q = 0; q < N_KNOWN; q++)
        if (known[q].runs_here() && (!isa || strcmp(isa, known[q].isa) == 0))
            return known[q].table[is_double];
    return NULL;
}

ptrdiff_t lstm_l2_bytes(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return 1 << 20;
}
