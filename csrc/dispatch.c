/* dispatch.c: the one place that knows which instruction sets exist. */

#include <string.h>
#include "lstm.h"
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

extern const lstm_kernels *const lstm_tables_base[];

#if defined(__GNUC__) && defined(__x86_64__)
extern const lstm_kernels *const lstm_tables_avx2[], *const lstm_tables_avx512[];
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#elif defined(__GNUC__) && defined(__aarch64__)
extern const lstm_kernels *const lstm_tables_neon[];
#endif
static int always(void) { return 1; }

static const struct {
    const char *isa;
    int (*runs_here)(void);
    const lstm_kernels *const *tables;  /* one per number format, then NULL */
} known[] = {
#if defined(__GNUC__) && defined(__x86_64__)
    {"avx512", has_avx512, lstm_tables_avx512},
    {"avx2", has_avx2, lstm_tables_avx2},
#elif defined(__GNUC__) && defined(__aarch64__)
    {"neon", always, lstm_tables_neon},
#endif
    {"base", always, lstm_tables_base},
};
enum { N_KNOWN = sizeof known / sizeof known[0] };

const char *lstm_isa(int k) {
    for (int q = 0; q < N_KNOWN; q++)
        if (known[q].runs_here() && k-- == 0) return known[q].isa;
    return NULL;
}

const lstm_kernels *lstm_kernels_for(const char *isa, const char *format) {
    for (int q = 0; q < N_KNOWN; q++)
        if (known[q].runs_here() && (!isa || strcmp(isa, known[q].isa) == 0))
            for (const lstm_kernels *const *k = known[q].tables; *k; k++)
                if (strcmp(format, (*k)->format) == 0) return *k;
    return NULL;
}

const lstm_cell *lstm_cell_of(const lstm_kernels *k, const char *name) {
    for (const lstm_cell *cell = k->cells; cell->name; cell++)
        if (strcmp(cell->name, name) == 0) return cell;
    return NULL;
}

ptrdiff_t lstm_l2_bytes(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return 1 << 20;
}
