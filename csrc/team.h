/* team.h: one parallel region, how large it may be, its barrier, and what fork() does to it. */

#ifndef LSTMCORE_TEAM_H
#define LSTMCORE_TEAM_H

typedef void team_fn(void *arg, int me, int team);

/* Runs fn(arg, me, team) for every me < team at once, where team <= n is what was granted: 1
   without OpenMP, inside another parallel region, and in a forked child (libgomp hangs there); a
   share of the CPUs while other calls run; and no more threads than the system lets us start. */
void team_run(int n, team_fn *fn, void *arg);

/* How many CPUs calls that run at once share; 0, as at the start: all get what they want. */
void team_set_cpus(int n);

/* A reusable barrier of the size given to each wait; zero it before its first use. */
typedef struct {
    int waiting;
    unsigned phase;
    int asleep, tired;
    char line[112];  /* a pair of cache lines of its own */
} team_barrier;
void team_wait(team_barrier *barrier, int size);

long team_regions(void);  /* parallel regions opened so far by this process */
int team_has_openmp(void);
int team_forked(void);

#endif
