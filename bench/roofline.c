/* What this machine can do: FMA and dot peaks per instruction set, read bandwidths, barrier and
 * region cost.
 *
 * usage: roofline THREADS L2_BYTES L3_BYTES      prints lines "name value", or "name absent" of an
 *        instruction that this CPU lacks; units: see roofline.py.
 * Every figure is the best of many short runs, so that a busy neighbor disturbs it little.
 * The probe measures the hardware alone: it shares no code with the kernels it is compared to. */
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { REPEATS = 9, FMA_REPEATS = 60, CHAINS = 12 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static volatile double sink; /* keeps results alive */

/* Twelve independent chains a = a*m + s, enough for two units of latency four or five. Named
 * variables, for an array of accumulators would be spilled. The factor stays opaque to the
 * compiler, and |m| < 1 keeps the values finite. */
#define FOR_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define DECLARE(n) v a##n = one * (scalar)(n + 1);
#define STEP(n) a##n = a##n * m + s;
#define ADD(n) total += a##n;
#define LOAD(n) a##n += p[n];
#define ZERO(n) v a##n = one * 0;

#define KERNELS(name, isa, type, lanes)                                                          \
    isa static void fma_##name(long rounds)                                                      \
    {                                                                                            \
        typedef type scalar;                                                                     \
        typedef type v __attribute__((vector_size(lanes * sizeof(type))));                       \
        v one = (v){0} + 1, m = one * (scalar)0.999, s = one * (scalar)0.001, total = one * 0;   \
        __asm__ volatile("" : REGISTER(m), REGISTER(s));                                         \
        FOR_CHAINS(DECLARE)                                                                      \
        for (long r = 0; r < rounds; r++) {                                                      \
            FOR_CHAINS(STEP)                                                                     \
        }                                                                                        \
        FOR_CHAINS(ADD)                                                                          \
        sink = total[0];                                                                         \
    }                                                                                            \
    isa static void read_##name(const char *data, size_t bytes)                                  \
    {                                                                                            \
        typedef type scalar;                                                                     \
        typedef type v __attribute__((vector_size(lanes * sizeof(type))));                       \
        v one = (v){0} + (scalar)1, total = one * 0;                                             \
        FOR_CHAINS(ZERO)                                                                         \
        const v *end = (const v *)data + bytes / sizeof(v) / CHAINS * CHAINS;                    \
        for (const v *p = (const v *)data; p < end; p += CHAINS) {                               \
            FOR_CHAINS(LOAD)                                                                     \
        }                                                                                        \
        FOR_CHAINS(ADD)                                                                          \
        sink = total[0];                                                                         \
    }

#if defined(__x86_64__)
#define REGISTER(value) "+x"(value)
#define TARGET(x) __attribute__((target(x)))
KERNELS(sse2_f32, , float, 4)
KERNELS(sse2_f64, , double, 2)
KERNELS(avx2_f32, TARGET("avx2,fma"), float, 8)
KERNELS(avx2_f64, TARGET("avx2,fma"), double, 4)
KERNELS(avx512_f32, TARGET("avx512f"), float, 16)
KERNELS(avx512_f64, TARGET("avx512f"), double, 8)
#define HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define HAS_AVX512 __builtin_cpu_supports("avx512f")
#define FOR_KERNELS(X)                                                                           \
    X(sse2_f32, 4, 1) X(sse2_f64, 2, 1) X(avx2_f32, 8, HAS_AVX2) X(avx2_f64, 4, HAS_AVX2)        \
    X(avx512_f32, 16, HAS_AVX512) X(avx512_f64, 8, HAS_AVX512)
#elif defined(__aarch64__)
#define REGISTER(value) "+w"(value)
KERNELS(neon_f32, , float, 4)
KERNELS(neon_f64, , double, 2)
#define FOR_KERNELS(X) X(neon_f32, 4, 1) X(neon_f64, 2, 1)
#else
#define REGISTER(value) "+m"(value)
KERNELS(base_f32, , float, 4)
KERNELS(base_f64, , double, 2)
#define FOR_KERNELS(X) X(base_f32, 4, 1) X(base_f64, 2, 1)
#endif

/* Twelve independent chains a = DOT(a, x, w) of products of pairs or quadruples of small numbers.
 * x turns opaque before each, or a product that does not depend on a would be computed once. */
#define DOT_DECLARE(n) v a##n = zero;
#define DOT_STEP(n)                                                                              \
    __asm__ volatile("" : REGISTER(x));                                                          \
    a##n = DOT(a##n, x, w);
#define DOT_KEEP(n) __asm__ volatile("" : REGISTER(a##n));
#define DOT_BODY(vector, operand)                                                                \
    {                                                                                            \
        typedef vector v;                                                                        \
        v zero = {0};                                                                            \
        operand x = {0}, w = {0};                                                                \
        __asm__ volatile("" : REGISTER(w));                                                      \
        FOR_CHAINS(DOT_DECLARE)                                                                  \
        for (long r = 0; r < rounds; r++) {                                                      \
            FOR_CHAINS(DOT_STEP)                                                                 \
        }                                                                                        \
        FOR_CHAINS(DOT_KEEP)                                                                     \
    }

/* name, products per instruction sequence, is it there? */
#if defined(__x86_64__)
#include <immintrin.h>
#define DOT(a, x, w) _mm256_add_epi32(a, _mm256_madd_epi16(x, w))
TARGET("avx2") static void dot_int16_avx2(long rounds) DOT_BODY(__m256i, __m256i)
#undef DOT
/* Sums of pairs saturate at 16 bits: exact for operands of 8 and 7 bits. */
#define DOT(a, x, w) _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), w))
TARGET("avx2") static void dot_int8_avx2(long rounds) DOT_BODY(__m256i, __m256i)
#undef DOT
#define DOT(a, x, w) _mm512_add_epi32(a, _mm512_madd_epi16(x, w))
TARGET("avx512bw") static void dot_int16_avx512bw(long rounds) DOT_BODY(__m512i, __m512i)
#undef DOT
#define DOT(a, x, w) _mm256_dpwssd_avx_epi32(a, x, w)
TARGET("avxvnni") static void dot_int16_avxvnni(long rounds) DOT_BODY(__m256i, __m256i)
#undef DOT
#define DOT(a, x, w) _mm256_dpbusd_avx_epi32(a, x, w)
TARGET("avxvnni") static void dot_int8_avxvnni(long rounds) DOT_BODY(__m256i, __m256i)
#undef DOT
#define DOT(a, x, w) _mm512_dpwssd_epi32(a, x, w)
TARGET("avx512vnni") static void dot_int16_avx512vnni(long rounds) DOT_BODY(__m512i, __m512i)
#undef DOT
#define DOT(a, x, w) _mm512_dpbusd_epi32(a, x, w)
TARGET("avx512vnni") static void dot_int8_avx512vnni(long rounds) DOT_BODY(__m512i, __m512i)
#undef DOT
#define DOT(a, x, w) _mm512_dpbf16_ps(a, x, w)
TARGET("avx512bf16") static void dot_bf16_avx512bf16(long rounds) DOT_BODY(__m512, __m512bh)
#undef DOT
#define HAS(feature) __builtin_cpu_supports(feature)

/* AMX: a tile of 16 rows times one of 16 columns; four sums, each three times in a round. */
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
static const struct {
    unsigned char palette, start, none[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
} shapes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#define DOT4(dot) dot(0, 4, 6); dot(1, 4, 7); dot(2, 5, 6); dot(3, 5, 7);
#define AMX_BODY(dot)                                                                            \
    {                                                                                            \
        _tile_loadconfig(&shapes);                                                               \
        for (long r = 0; r < rounds; r++) {                                                      \
            DOT4(dot) DOT4(dot) DOT4(dot)                                                        \
        }                                                                                        \
        _tile_release();                                                                         \
    }
TARGET("amx-tile,amx-bf16") static void dot_bf16_amx(long rounds) AMX_BODY(_tile_dpbf16ps)
TARGET("amx-tile,amx-int8") static void dot_int8_amx(long rounds) AMX_BODY(_tile_dpbusd)
static int has_amx(void)
{
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 3) == 3 &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#define FOR_AMX(X) X(bf16_amx, 8192, has_amx()) X(int8_amx, 16384, has_amx())
#else
#define FOR_AMX(X)
#endif
#define FOR_DOTS(X) FOR_AMX(X)                                                                   \
    X(int16_avx2, 16, HAS("avx2")) X(int8_avx2, 32, HAS("avx2"))                                 \
    X(int16_avx512bw, 32, HAS("avx512bw"))                                                       \
    X(int16_avxvnni, 16, HAS("avxvnni")) X(int8_avxvnni, 32, HAS("avxvnni"))                     \
    X(int16_avx512vnni, 32, HAS("avx512vnni")) X(int8_avx512vnni, 64, HAS("avx512vnni"))         \
    X(bf16_avx512bf16, 32, HAS("avx512bf16"))
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define TARGET(x) __attribute__((target(x)))
#define DOT(a, x, w) vmlal_high_s16(vmlal_s16(a, vget_low_s16(x), vget_low_s16(w)), x, w)
static void dot_int16_neon(long rounds) DOT_BODY(int32x4_t, int16x8_t)
#undef DOT
#define DOT(a, x, w) vdotq_s32(a, x, w)
TARGET("arch=armv8.2-a+dotprod") static void dot_int8_neon(long rounds)
    DOT_BODY(int32x4_t, int8x16_t)
#undef DOT
#define DOT(a, x, w) vbfdotq_f32(a, (bfloat16x8_t)x, (bfloat16x8_t)w)
TARGET("arch=armv8.2-a+bf16") static void dot_bf16_neon(long rounds)
    DOT_BODY(float32x4_t, int16x8_t)
#undef DOT
#define FOR_DOTS(X)                                                                              \
    X(int16_neon, 8, 1) X(int8_neon, 16, (getauxval(AT_HWCAP) >> 20) & 1)                        \
    X(bf16_neon, 8, (getauxval(AT_HWCAP2) >> 14) & 1)
#else
#define FOR_DOTS(X)
#endif

typedef void (*product_kernel)(long);
typedef void (*read_kernel)(const char *, size_t);

/* Seconds from the start of the first thread to the end of the last. */
#define TIMED(threads, body)                                                                     \
    ({                                                                                           \
        double begin = 0;                                                                        \
        _Pragma("omp parallel num_threads(threads)")                                             \
        {                                                                                        \
            int me = omp_get_thread_num();                                                       \
            (void)me;                                                                            \
            _Pragma("omp barrier") _Pragma("omp master") begin = now();                          \
            _Pragma("omp barrier") body;                                                         \
        }                                                                                        \
        now() - begin;                                                                           \
    })

static double gops(product_kernel kernel, int products, int threads)
{
    const long rounds = 200000; /* 0.4 ms at 3 GHz: some run escapes the neighbors */
    double best = 1e30;
    for (int r = 0; r < FMA_REPEATS; r++) {
        double seconds = TIMED(threads, kernel(rounds));
        best = seconds < best ? seconds : best;
    }
    return 2e-9 * products * CHAINS * rounds * threads / best;
}

/* Every thread reads its own `bytes`, over and over, about 64 MB in all. */
static double read_gbytes(read_kernel kernel, char **data, size_t bytes, int threads)
{
    long passes = 1 + (256L << 20) / bytes / 4;
    double best = 1e30;
    for (int r = 0; r < REPEATS; r++) {
        double seconds = TIMED(threads, for (long i = 0; i < passes; i++) kernel(data[me], bytes));
        best = seconds < best ? seconds : best;
    }
    return 1e-9 * bytes * passes * threads / best;
}

/* The barrier a kernel can hope for: arrive, spin a while, then yield the processor. */
static atomic_int arrived, phase;
static void spin_barrier(int threads)
{
    int mine = atomic_load(&phase);
    if (atomic_fetch_add(&arrived, 1) == threads - 1) {
        atomic_store(&arrived, 0);
        atomic_store(&phase, mine + 1);
        return;
    }
    for (int spins = 0; atomic_load(&phase) == mine; spins++)
        if (spins > 2000)
            sched_yield();
}

static double barrier_ns(int threads)
{
    const int n = 5000;
    double best = 1e30;
    for (int r = 0; r < REPEATS; r++) {
        double seconds = TIMED(threads, for (int i = 0; i < n; i++) spin_barrier(threads));
        best = seconds < best ? seconds : best;
    }
    return 1e9 * best / n;
}

static double region_ns(int threads)
{
    const int n = 500;
    double best = 1e30;
    for (int r = 0; r < REPEATS; r++) {
        double begin = now();
        for (int i = 0; i < n; i++) {
#pragma omp parallel num_threads(threads)
            __asm__ volatile("");
        }
        double seconds = now() - begin;
        best = seconds < best ? seconds : best;
    }
    return 1e9 * best / n;
}

int main(int argc, char **argv)
{
    if (argc != 4 || atoi(argv[1]) < 1)
        return 2;
    int threads = atoi(argv[1]);
    size_t l2 = strtoul(argv[2], 0, 10), l3 = strtoul(argv[3], 0, 10);
    read_kernel read = 0;
#define FMA(name, lanes, available)                                                              \
    if (available) {                                                                             \
        printf("fma_" #name " %.1f\n", gops(fma_##name, lanes, threads));                  \
        read = read_##name;                                                                      \
    }
    FOR_KERNELS(FMA)
#define DOTS(name, products, available)                                                          \
    if (available)                                                                               \
        printf("dot_" #name " %.1f\n", gops(dot_##name, products, threads));               \
    else                                                                                         \
        printf("dot_" #name " absent\n");
    FOR_DOTS(DOTS)
    size_t in_l3 = l3 / 3 / threads > 2 * l2 ? l3 / 3 / threads : 2 * l2;
    size_t in_memory = 4 * l3 / threads < (256 << 20) ? 4 * l3 / threads : (256 << 20);
    char *data[threads];
    for (int i = 0; i < threads; i++) {
        data[i] = aligned_alloc(1 << 21, (in_memory + (1 << 21)) >> 21 << 21);
        if (!data[i])
            return 1;
    }
    TIMED(threads, memset(data[me], 0, in_memory)); /* every thread touches its own pages first */
    printf("read_l2 %.1f\n", read_gbytes(read, data, l2 * 6 / 10, threads));
    printf("read_l3 %.1f\n", read_gbytes(read, data, in_l3, threads));
    printf("read_memory %.1f\n", read_gbytes(read, data, in_memory, threads));
    printf("barrier_ns %.0f\nregion_ns %.0f\n", barrier_ns(threads), region_ns(threads));
    for (int i = 0; i < threads; i++)
        free(data[i]);
    return 0;
}
