/* team.c: see team.h.

   libgomp keeps a pool for each calling thread, as large as its last team of two or more; a larger
   team starts the missing threads, and where one cannot be started, libgomp ends the process. So a
   team that outgrows its pool is tried out first with plain threads (startable). */

#include "team.h"

#if defined(__unix__) || defined(__APPLE__)
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>
#define POSIX 1
#endif
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP) && defined(POSIX)
#include <omp.h>
#define THREADS 1
#endif

static int forked, cpus;

int team_forked(void) { return forked; }
void team_set_cpus(int n) { cpus = n; }

#ifdef POSIX
static void after_fork_in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(0, 0, after_fork_in_child);
}
#endif

/* ---- the barrier ------------------------------------------------------------------------------- */

#ifdef POSIX

static int running;  /* threads of all calls in flight */

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static void sleep_while(unsigned *word, unsigned value) {
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
    (void)word, (void)value;
    sched_yield();
#endif
}

static void wake_all(unsigned *word) {
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

/* Spins, then sleeps. A spin is 25 to 50 ns, and to sleep and be woken costs 5 to 50 µs. Next to
   nothing is spun where there are more threads than CPUs, one of which a spinning thread keeps from
   the others, nor for some waits after spinning was in vain: other programs may keep the CPUs, too.
   Two threads on two CPUs with a busy process beside, 100 phases of 60 µs: 48 ms; with 1000 spins at
   every wait 79, with 100 59, and with sched_yield() in place of sleep 177. */
void team_wait(team_barrier *barrier, int size) {
    enum { SPINS = 4000, FEW = 20, TIRED = 8 };
    unsigned phase = __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE);
    if (size == 1) return;
    if (__atomic_add_fetch(&barrier->waiting, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&barrier->waiting, 0, __ATOMIC_RELAXED);
        /* Sequentially consistent, as is the sleepers' count: either it is seen here, or the sleeper
           finds the new phase when it lies down. */
        __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&barrier->asleep, __ATOMIC_SEQ_CST)) wake_all(&barrier->phase);
        return;
    }
    int threads = __atomic_load_n(&running, __ATOMIC_RELAXED);
    int crowded = cpus && (threads > cpus || size > cpus);
    int tired = __atomic_load_n(&barrier->tired, __ATOMIC_RELAXED);
    for (int spins = crowded || tired ? FEW : SPINS; spins; spins--) {
        if (__atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) != phase) return;
        pause_cpu();
    }
    __atomic_store_n(&barrier->tired, tired ? tired - 1 : TIRED * size, __ATOMIC_RELAXED);
    __atomic_add_fetch(&barrier->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase)
        sleep_while(&barrier->phase, phase);
    __atomic_sub_fetch(&barrier->asleep, 1, __ATOMIC_RELAXED);
}

#else

void team_wait(team_barrier *barrier, int size) { (void)barrier; (void)size; }

#endif

/* ---- calls in flight --------------------------------------------------------------------------- */

#ifdef THREADS

static struct {
    pthread_mutex_t lock;
    int calls;               /* in flight */
    int sharers;             /* by how many a call divides the CPUs: seen, rounded, in no hurry */
    double seen[2];          /* decayed integrals of calls and calls² over time (ns) */
    double since;            /* when calls last changed */
} flight __attribute__((aligned(128))) = {.lock = PTHREAD_MUTEX_INITIALIZER, .sharers = 1};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

/* One call more or less. The number of calls that a call sees beside it, itself included, is
   Σ calls² / Σ calls: 1 for a lone caller however long its pauses, 1.05 for a long call beside
   short ones that fill a fortieth of the time (whose peak would be 2), 1.8 for two callers that are
   at it four fifths of the time (whose mean would be 1.6). */
static void count(int calls) {
    const double MEMORY = 50e6, PRIOR = 1e6;  /* ns; a lone call is what was never seen */
    double time = now(), spent = time - flight.since, keep = MEMORY / (MEMORY + spent), sees;
    flight.since = time;
    flight.seen[0] = keep * (flight.seen[0] + spent * flight.calls);
    flight.seen[1] = keep * (flight.seen[1] + spent * flight.calls * flight.calls);
    sees = (flight.seen[1] + PRIOR) / (flight.seen[0] + PRIOR);
    if (sees > flight.sharers + 0.6 || sees < flight.sharers - 0.6)
        flight.sharers = (int)(sees + 0.5);
    flight.calls += calls;
}

/* The team of a call that wants n threads. One size for as long as the load stays the same, or the
   pools of libgomp would start and end threads at every call. */
static int enter(int n) {
    int most = n;
    pthread_mutex_lock(&flight.lock);
    count(1);
    if (cpus && flight.sharers > 1) most = cpus / flight.sharers;
    if (cpus && flight.calls > 1) {
        int idle = cpus - running, fair = cpus / flight.calls;
        int room = idle > fair ? idle : fair;
        if (most > room) most = room;
    }
    if (n > most) n = most > 1 ? most : 1;
    __atomic_add_fetch(&running, n, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&flight.lock);
    return n;
}

static void leave(int n) {
    pthread_mutex_lock(&flight.lock);
    count(-1);
    __atomic_sub_fetch(&running, n, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&flight.lock);
}

/* ---- the region -------------------------------------------------------------------------------- */

static long regions;
static size_t stack_bytes;                    /* of libgomp's threads; 0: the system's default */
static pthread_mutex_t growing = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local struct {
    int size;         /* of this thread's pool, itself included; 0: none yet */
    int most;         /* what could be started at the last refusal; 0: none */
    double refused;   /* when that was */
} pool;

int team_has_openmp(void) { return 1; }
long team_regions(void) { return __atomic_load_n(&regions, __ATOMIC_RELAXED); }

/* As libgomp reads them when it is loaded: a number of KB, or with a unit. */
__attribute__((constructor)) static void read_stack_bytes(void) {
    const char *names[] = {"OMP_STACKSIZE", "GOMP_STACKSIZE"};
    for (int k = 0; k < 2 && !stack_bytes; k++) {
        char *end = getenv(names[k]);
        if (!end || *end == '-') continue;
        stack_bytes = strtoul(end, &end, 10);
        while (*end == ' ') end++;
        switch (*end) {
        case 'b': case 'B': break;
        case 'm': case 'M': stack_bytes <<= 20; break;
        case 'g': case 'G': stack_bytes <<= 30; break;
        default: stack_bytes <<= 10;
        }
    }
}

typedef struct {
    pthread_t thread;
    pthread_mutex_t *gate;
    long id;
    char spare[4096];                         /* libgomp's own memory for a thread is below that */
} Trial;

static void *live(void *arg) {
    Trial *me = arg;
#ifdef __linux__
    me->id = syscall(SYS_gettid);
#endif
    pthread_mutex_lock(me->gate);
    pthread_mutex_unlock(me->gate);
    return NULL;
}

static void refuse(int n) {
    pool.most = n;
    pool.refused = now();
}

/* How many of n more threads to start: all if they can live at once, else half of those that can:
   the process needs something else than threads, too. */
static int startable(int n) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    Trial *trial = malloc(n * sizeof *trial);
    int alive = 0;
    if (!trial) return 0;
    pthread_attr_init(&attributes);
    if (stack_bytes) pthread_attr_setstacksize(&attributes, stack_bytes);
    pthread_mutex_lock(&gate);
    for (; alive < n; alive++) {
        trial[alive].gate = &gate;
        if (pthread_create(&trial[alive].thread, &attributes, live, &trial[alive])) break;
    }
    pthread_mutex_unlock(&gate);
    for (int k = 0; k < alive; k++) pthread_join(trial[k].thread, NULL);
#ifdef __linux__
    /* A thread that was joined counts against the limits until the kernel has let go of it. */
    for (int k = 0; k < alive; k++)
        for (int wait = 0; wait < 1000 && !syscall(SYS_tgkill, getpid(), trial[k].id, 0); wait++)
            sched_yield();
#endif
    pthread_attr_destroy(&attributes);
    free(trial);
    return alive == n ? n : alive / 2;
}

/* A team of n from a pool of fewer. The lock is held until the threads exist: of two callers each
   could start what both together cannot. */
static int grow(int n) {
    const double RETRY = 10e9;                /* ns: trying 1000 threads takes some 20 ms */
    int size = pool.size ? pool.size : 1;
    if (pool.most && now() - pool.refused < RETRY && n > pool.most) n = pool.most;
    if (n <= size) return n;
    int more = startable(n - size);
    if (more < n - size) refuse(size + more);
    return size + more;
}

static void open_region(int n, team_fn *fn, void *arg) {
    int outgrown = n > pool.size;
    if (outgrown) {
        pthread_mutex_lock(&growing);
        n = grow(n);
    }
    __atomic_add_fetch(&regions, 1, __ATOMIC_RELAXED);
#pragma omp parallel num_threads(n)
    {
        int me = omp_get_thread_num(), team = omp_get_num_threads();
        if (me == 0) {                        /* the thread that called; by now the others exist */
            if (team < n) refuse(team);       /* OMP_THREAD_LIMIT, OMP_DYNAMIC */
            if (team > 1) pool.size = team;
            if (outgrown) pthread_mutex_unlock(&growing);
        }
        fn(arg, me, team);
    }
}

void team_run(int n, team_fn *fn, void *arg) {
    if (forked || omp_in_parallel()) {
        fn(arg, 0, 1);
        return;
    }
    n = enter(n);
    if (n == 1) fn(arg, 0, 1);
    else open_region(n, fn, arg);
    leave(n);
}

#else

int team_has_openmp(void) { return 0; }
long team_regions(void) { return 0; }
void team_run(int n, team_fn *fn, void *arg) { (void)n; fn(arg, 0, 1); }

#endif
