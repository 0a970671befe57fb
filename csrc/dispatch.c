/* dispatch.c: the one place that knows which instruction sets exist. */

#include <string.h>
#include "lstm.h"
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

extern const lstm_kernels *const lstm_tables_base[];

#if defined(__GNUC__) && defined(__x86_64__)
extern const lstm_kernels *const lstm_tables_avx2[], *const lstm_tables_avxvnni[];
extern const lstm_kernels *const lstm_tables_avx512[], *const lstm_tables_avx512vnni[];
extern const lstm_kernels *const lstm_tables_avx512bf16[];
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avxvnni(void) {          /* older compilers have no name for it to ask by */
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
static int has_avx512vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define AMX
extern const lstm_kernels *const lstm_tables_amx[];
/* Linux lends the memory for its tiles to a process that asks. */
static int has_amx(void) {
    enum { ASK = 0x1023,
           TILES = 18,
           BF16 = 1 << 22,
           TILE = 1 << 24,
           INT8 = 1 << 25 };
    static int known = -1;
    unsigned a, b, c, d = 0;
    if (known < 0)
        known = has_avx512vnni() && __builtin_cpu_supports("avx512bf16") &&
                __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) && (d & INT8) &&
                syscall(SYS_arch_prctl, ASK, TILES) == 0;
    return known;
}
#endif
static int has_avx512bf16(void) { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }

/* Cycles of a small product: the least of a few. */
static unsigned long long time_of(const lstm_kernels *k, void *packed, char *low) {
    enum { ROWS = 6,
           COLUMNS = 64,
           K = 128 };
    static float W[K * COLUMNS], out[ROWS][COLUMNS];
    const void *a[ROWS];
    void *C[ROWS];
    lstm_operand w = {.gates = 1, .K = K, .N = COLUMNS, .W = W, .k_stride = COLUMNS, .col_stride = 1, .packed = packed};
    lstm_rows rows = {START_ZERO, ROWS, a, NULL, C};
    unsigned long long least = ~0ull;
    k->pack(&w, 0, COLUMNS, 0, (COLUMNS / k->VL + 3) / 4);
    for (int r = 0; r < ROWS; r++)
        k->lower(K, W, low + r * k->lowered_bytes(K)), a[r] = low + r * k->lowered_bytes(K), C[r] = out[r];
    for (int q = 0; q < 8; q++) {
        unsigned long long from = __builtin_ia32_rdtsc();
        k->gemm(&w, 0, COLUMNS, &rows);
        unsigned long long took = __builtin_ia32_rdtsc() - from;
        if (took < least) least = took;
    }
    return least;
}

/* Whether the instruction for bfloat16 is faster than multiply-adds on expanded numbers: twice on AMD's
   CPUs, half as fast on Intel's. The bits are the same. */
static int avx512bf16_pays(void) {
    static _Alignas(64) char packed[64 * 128 * 2], low[6 * 128 * 4];
    static int known = -1;
    if (known < 0) {
        const lstm_kernels *own = lstm_tables_avx512bf16[0], *other = lstm_kernels_for("avx512", own->format);
        known = time_of(own, packed, low) < time_of(other, packed, low);
    }
    return known;
}
#elif defined(__GNUC__) && defined(__aarch64__)
extern const lstm_kernels *const lstm_tables_neon[], *const lstm_tables_neondot[];
static int has_neondot(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & 1 << 20) != 0;  /* HWCAP_ASIMDDP */
#else
    return 1;                                     /* every Apple CPU that runs AArch64 in a computer */
#endif
}
#endif
static int always(void) { return 1; }

/* Best first.  A row with `more` lacks formats that the next row has for it; one that runs here but does not
   pay comes last. */
static const struct {
    const char *isa;
    int (*runs_here)(void), (*pays)(void);
    int more;
    const lstm_kernels *const *tables;  /* one per number format, then NULL */
} known[] = {
#if defined(__GNUC__) && defined(__x86_64__)
#ifdef AMX
    {"amx", has_amx, always, 1, lstm_tables_amx},
#endif
    {"avx512bf16", has_avx512bf16, avx512bf16_pays, 1, lstm_tables_avx512bf16},
    {"avx512vnni", has_avx512vnni, always, 1, lstm_tables_avx512vnni},
    {"avx512", has_avx512, always, 0, lstm_tables_avx512},
    {"avxvnni", has_avxvnni, always, 1, lstm_tables_avxvnni},
    {"avx2", has_avx2, always, 0, lstm_tables_avx2},
#elif defined(__GNUC__) && defined(__aarch64__)
    {"neondot", has_neondot, always, 1, lstm_tables_neondot},
    {"neon", always, always, 0, lstm_tables_neon},
#endif
    {"base", always, always, 0, lstm_tables_base},
};
enum { N_KNOWN = sizeof known / sizeof known[0] };

const char *lstm_isa(int k) {
    for (int pays = 1; pays >= 0; pays--)
        for (int q = 0; q < N_KNOWN; q++)
            if (known[q].runs_here() && known[q].pays() == pays && k-- == 0) return known[q].isa;
    return NULL;
}

const lstm_kernels *lstm_kernels_for(const char *isa, const char *format) {
    for (int q = 0; q < N_KNOWN; q++) {
        if (!known[q].runs_here() || (isa && strcmp(isa, known[q].isa) != 0)) continue;
        do {
            for (const lstm_kernels *const *k = known[q].tables; *k; k++)
                if (strcmp(format, (*k)->format) == 0) return *k;
        } while (known[q++].more);
        return NULL;
    }
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
