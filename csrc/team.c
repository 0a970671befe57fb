/* team.c: see team.h. */

#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#define POSIX 1
#endif

#ifdef _OPENMP
static long regions;
#endif
static int forked;

#ifdef POSIX
static void after_fork_in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(0, 0, after_fork_in_child);
}
#endif

int team_forked(void) { return forked; }

#ifdef _OPENMP

int team_has_openmp(void) { return 1; }
long team_regions(void) { return __atomic_load_n(&regions, __ATOMIC_RELAXED); }

void team_run(int n, team_fn *fn, void *arg) {
    if (n == 1 || forked) {
        fn(arg, 0, 1);
        return;
    }
    __atomic_add_fetch(&regions, 1, __ATOMIC_RELAXED);
#pragma omp parallel num_threads(n)
    fn(arg, omp_get_thread_num(), omp_get_num_threads());
}

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

void team_wait(team_barrier *barrier, int size) {
    enum { SPINS = 4000 };  /* then yield: a descheduled peer would cost its whole time slice */
    int phase = __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE);
    if (size == 1) return;
    if (__atomic_add_fetch(&barrier->waiting, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&barrier->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spin = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase;)
        if (spin < SPINS) { spin++; pause_cpu(); }
        else sched_yield();
}

#else

int team_has_openmp(void) { return 0; }
long team_regions(void) { return 0; }
void team_run(int n, team_fn *fn, void *arg) { (void)n; fn(arg, 0, 1); }
void team_wait(team_barrier *barrier, int size) { (void)barrier; (void)size; }

#endif
