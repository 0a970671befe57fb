/* team.c: the barrier, the region and the tries behind it, checked by counting.

   With libgomp, which the race detector cannot see into, team_run is checked; the barrier runs on
   plain threads, so that a build with -fsanitize=thread and without -fopenmp sees all of it. */

#include "team.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <dlfcn.h>
#include <errno.h>
#endif

#define CHECK(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            exit(1); \
        } \
    } while (0)

enum { MOST = 8, PHASES = 1000 };

#ifndef _OPENMP

/* ---- the barrier: in each phase everybody writes its place, then reads everybody's --------------- */

static struct {
    team_barrier barrier;
    int size, late;             /* late: who lets the others wait in some phases; -1 nobody */
    long place[2][MOST];        /* by parity: a second barrier between would hide a lost phase */
} meeting;

static void meet(int me) {
    for (long phase = 1; phase <= PHASES; phase++) {
        if (me == meeting.late && phase % 100 == 0) usleep(200);
        meeting.place[phase & 1][me] = phase;
        team_wait(&meeting.barrier, meeting.size);
        for (int k = 0; k < meeting.size; k++) CHECK(meeting.place[phase & 1][k] == phase);
    }
}

static void *meet_thread(void *me) {
    meet((int)(long)me);
    return NULL;
}

static void check_barrier(int size, int late) {
    pthread_t thread[MOST];
    memset(&meeting, 0, sizeof meeting);
    meeting.size = size, meeting.late = late;
    for (long k = 1; k < size; k++)
        CHECK(!pthread_create(&thread[k], NULL, meet_thread, (void *)k));
    meet(0);
    for (int k = 1; k < size; k++) CHECK(!pthread_join(thread[k], NULL));
    CHECK(meeting.barrier.waiting == 0 && meeting.barrier.asleep == 0);
    CHECK(meeting.barrier.phase == (size > 1 ? PHASES : 0));
}

static void *wait_5_ms(void *barrier) {
    struct timespec start, end;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
    team_wait(barrier, 2);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    return (void *)((end.tv_sec - start.tv_sec) * 1000000000L + end.tv_nsec - start.tv_nsec);
}

/* CPU time (s) that a thread takes to wait 5 ms for another, 20 times. */
static double burnt(int cpus) {
    double sum = 0;
    team_set_cpus(cpus);
    for (int k = 0; k < 20; k++) {
        team_barrier barrier = {0};
        pthread_t thread;
        void *ns;
        CHECK(!pthread_create(&thread, NULL, wait_5_ms, &barrier));
        usleep(5000);
        team_wait(&barrier, 2);
        CHECK(!pthread_join(thread, &ns));
        sum += (long)ns * 1e-9;
    }
    return sum;
}

#endif

/* ---- the region ---------------------------------------------------------------------------------- */

typedef struct {
    int team, runs[1024];       /* runs[me]: how often fn was called as `me` */
    team_barrier barrier;
    void (*inside)(void);       /* what thread 0 does */
} Region;

static void note(void *arg, int me, int team) {
    Region *r = arg;
    __atomic_add_fetch(&r->runs[me], 1, __ATOMIC_RELAXED);
    if (me == 0) {
        r->team = team;
        if (r->inside) r->inside();
    }
    team_wait(&r->barrier, team);
}

/* The team that n threads were granted; each of them ran once. */
static int granted(int n, void (*inside)(void)) {
    Region *r = calloc(1, sizeof *r);
    r->inside = inside;
    team_run(n, note, r);
    int team = r->team;
    CHECK(1 <= team && team <= n);
    for (int k = 0; k < 1024; k++) CHECK(r->runs[k] == (k < team));
    free(r);
    return team;
}

#ifdef _OPENMP

static int tried, alive, limit = 1 << 20;   /* threads; above the limit the system refuses more */

typedef struct {
    void *(*fn)(void *);
    void *arg;
} Start;

static void count_off(void *nothing) {
    (void)nothing;
    __atomic_sub_fetch(&alive, 1, __ATOMIC_SEQ_CST);
}

static void *count_and_run(void *arg) {
    Start start = *(Start *)arg;
    void *result;
    free(arg);
    pthread_cleanup_push(count_off, NULL);      /* libgomp ends a caller's pool by pthread_exit */
    result = start.fn(start.arg);
    pthread_cleanup_pop(1);
    return result;
}

/* In place of the C library's, for team.c and libgomp alike; libgomp ends the process if it fails. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*fn)(void *),
                   void *arg) {
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    tried++;
    if (__atomic_add_fetch(&alive, 1, __ATOMIC_SEQ_CST) > limit) {
        __atomic_sub_fetch(&alive, 1, __ATOMIC_SEQ_CST);
        return EAGAIN;
    }
    Start *start = malloc(sizeof *start);
    *start = (Start){fn, arg};
    return real(thread, attributes, count_and_run, start);
}

static int inner;
static void run_8_inside(void) { inner = granted(8, NULL); }

static struct { pthread_barrier_t in, out; } caller;
static void stay(void) { pthread_barrier_wait(&caller.in), pthread_barrier_wait(&caller.out); }
static void *call_with_4(void *team) {
    *(int *)team = granted(4, stay);
    return NULL;
}

static void nap(void) { usleep(300000); }

/* What is granted beside a team of 4 on 12 CPUs: the 8 that are idle, until two calls at once are the
   rule, as they are to a call that had to wait for its CPU. */
static int beside_4(void) {
    pthread_t other;
    int team, mine;
    team_set_cpus(12);
    pthread_create(&other, NULL, call_with_4, &team);
    pthread_barrier_wait(&caller.in);
    mine = granted(16, NULL);
    pthread_barrier_wait(&caller.out);
    pthread_join(other, NULL);
    return mine;
}

static void check_sharing(void) {
    pthread_t other;
    int team, tries = 20;
    pthread_barrier_init(&caller.in, NULL, 2);
    pthread_barrier_init(&caller.out, NULL, 2);
    while (beside_4() != 8 && --tries) usleep(100000);
    CHECK(tries);
    team_set_cpus(8);
    CHECK(granted(16, NULL) == 16);                 /* alone: as many as it wants */
    pthread_create(&other, NULL, call_with_4, &team);
    pthread_barrier_wait(&caller.in);
    CHECK(granted(16, NULL) == 4 && granted(3, NULL) == 3);     /* beside a team of 4 on 8 CPUs */
    granted(1, nap);                                /* two at once have become the rule: */
    team_set_cpus(16);
    CHECK(granted(16, NULL) == 8);                  /* not the 12 CPUs that are idle now */
    team_set_cpus(1);
    CHECK(granted(16, NULL) == 1);                  /* never none */
    team_set_cpus(0);
    CHECK(granted(16, NULL) == 16);                 /* nobody counts */
    pthread_barrier_wait(&caller.out);
    pthread_join(other, NULL);
    CHECK(team == 4);
}

static void *call_with_none_left(void *team) {
    limit = 0;
    *(int *)team = granted(8, NULL);
    return NULL;
}

/* The system refuses: fewer threads, and the process goes on. */
static void check_refusals(void) {
    pthread_t other;
    int team;
    CHECK(granted(4, NULL) == 4);
    for (int wait = 0; wait < 10000 && __atomic_load_n(&alive, __ATOMIC_SEQ_CST) > 3; wait++)
        usleep(1000);                               /* for the threads that end in their own time */
    CHECK(alive == 3);
    tried = 0;
    CHECK(granted(4, NULL) == 4 && granted(1, NULL) == 1 && granted(4, NULL) == 4 && tried == 0);
    limit = alive + 60;
    CHECK(granted(1000, NULL) == 4 + 30);           /* 60 could live, half are left to others */
    limit = 0, tried = 0;
    CHECK(granted(1000, NULL) == 34 && tried == 0); /* the refusal is remembered */
    CHECK(granted(2, NULL) == 2 && tried == 0);     /* this ends 32 threads of the pool, */
    CHECK(granted(34, NULL) == 2);                  /* which are not there any more */
    limit = 1 << 20;
    CHECK(!pthread_create(&other, NULL, call_with_none_left, &team) && !pthread_join(other, NULL));
    CHECK(team == 1);                               /* each caller has a pool of its own: here, none */
}

int main(void) {
    team_set_cpus(0);
    for (int n = 1; n <= MOST; n++)
        for (int k = 0; k < 20; k++) CHECK(granted(n, NULL) == n);
    long before = team_regions();
    granted(1, NULL), granted(2, NULL), granted(5, run_8_inside);
    CHECK(team_regions() - before == 2 && inner == 1);
    check_sharing();
    check_refusals();
    puts("team_run: good");
    return 0;
}

#else

int main(void) {
    CHECK(granted(8, NULL) == 1 && team_regions() == 0 && !team_has_openmp());
    for (int cpus = 0; cpus <= 2; cpus += 2) {
        team_set_cpus(cpus);
        for (int size = 1; size <= MOST; size++)
            for (int late = -1; late < size; late += size) check_barrier(size, late);
    }
    CHECK(2 * burnt(1) < burnt(2));                 /* where there is no CPU for it, nobody spins */
    puts("team_wait: good");
    return 0;
}

#endif
