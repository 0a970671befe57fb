# The memory of a call: blocks that calls hand to one another, and an arena that cuts one up.

cdef class Workspace:
    cdef char *data
    cdef size_t size


cdef Workspace take_workspace(size_t size)
cdef void give_back(Workspace w)


cdef struct Arena:
    char *base                     # NULL: only count
    size_t used


cdef inline size_t padded(size_t bytes) noexcept nogil:
    return (bytes + 63) & ~<size_t>63


cdef inline char *take(Arena *arena, size_t bytes) noexcept nogil:
    """The next bytes, 64-byte aligned."""
    cdef char *p = arena.base + arena.used if arena.base != NULL else NULL
    arena.used += padded(bytes)
    return p


cdef inline Arena arena_of(Workspace w):
    cdef Arena arena
    arena.base, arena.used = <char *>padded(<size_t>w.data), 0
    return arena
