# csrc/team.h as Cython sees it: one parallel region and its barrier.

cdef extern from "team.h" nogil:
    ctypedef void team_fn(void *arg, int me, int team) noexcept nogil
    ctypedef struct team_barrier:
        pass
    void team_run(int n, team_fn *fn, void *arg)
    void team_wait(team_barrier *barrier, int size)
    long team_regions()
    int team_has_openmp()
    int team_forked()
    void team_set_cpus(int n)
