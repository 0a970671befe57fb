"""The decisions of a plan are functions of sizes, caches and threads alone: no machine is asked."""

import itertools

import pytest

from lstmcore._grid import choose_chunk, choose_fused, choose_grid

L2 = 1 << 20


def loop(rows, H, *, steps=35, I=None, VL=16, tile_rows=6, gates=4, item=4, cache=L2):
    """A layer of H units as the decisions see it."""
    return dict(steps=steps, rows=rows, vectors=-(-H // VL), tile_rows=tile_rows,
                input_bytes=gates * H * (H if I is None else I) * item,
                recurrent_bytes=gates * H * H * item, gate_bytes=gates * H * 4, cache_bytes=cache)


def grid(problem, team):
    return tuple(choose_grid(problem, team)[part] for part in ("rows", "units"))


GRIDS = [  # what, problem, team, (row groups, unit slabs)
    ("weights in the cache: rows alone", loop(50, 128), 2, (2, 1)),
    ("weights far larger, few rows: units", loop(20, 650), 2, (1, 2)),
    ("weights far larger, rows enough: rows alone", loop(500, 650), 2, (2, 1)),
    ("one row: nothing but units", loop(1, 512), 2, (1, 2)),
    ("one row in the cache: units, there is nothing else", loop(1, 64), 4, (1, 4)),
    ("no more slabs than vectors of units", loop(1, 17), 8, (1, 2)),
    ("three threads, two rows: one has nothing to do", loop(2, 64), 3, (2, 1)),
    ("a cache of 256 KB asks for slabs", loop(50, 128, cache=1 << 18), 2, (1, 2)),
    ("one vector cannot be shared out", loop(8, 16), 2, (2, 1)),
    ("three slabs of four threads would leave one without", loop(9, 330), 4, (1, 4)),
    ("one thread", loop(20, 650), 1, (1, 1)),
]


@pytest.mark.parametrize("problem, team, want", [case[1:] for case in GRIDS],
                         ids=[case[0] for case in GRIDS])
def test_grid_of_named_cases(problem, team, want):
    assert grid(problem, team) == want


@pytest.mark.parametrize("team", [1, 2, 3, 4, 6, 7, 16, 64])
def test_grid_fits_team_rows_and_units(team):
    for rows, H, cache in itertools.product((1, 2, 3, 20, 50, 1000), (1, 15, 16, 17, 64, 300, 650, 1024),
                                            (1 << 18, L2, 1 << 24)):
        problem = loop(rows, H, cache=cache)
        groups, slabs = grid(problem, team)
        assert 1 <= groups <= rows and 1 <= slabs <= problem["vectors"]
        assert groups * slabs <= team


def test_slabs_follow_from_the_cache():
    slabs = [grid(loop(20, 1024, cache=cache), 8)[1] for cache in (1 << 20, 1 << 22, 1 << 24, 1 << 26)]
    assert slabs == sorted(slabs, reverse=True) and slabs[0] == 8 and slabs[-1] == 1


@pytest.mark.parametrize("problem, team, want", [
    (loop(1, 650, steps=1), 2, True),               # a single step reads all weights once
    (loop(50, 128, steps=50), 2, True),             # all weights of a thread stay in its cache
    (loop(20, 650), 2, False),
    (loop(50, 64, I=5000, steps=50), 2, False),     # W_ih alone is larger
    (loop(40, 256, steps=50), 1, False),            # 2 MB for one thread
    (loop(40, 256, steps=50), 2, True),             # 1 MB for each of two
    (loop(8, 256, steps=50), 2, False),             # too few rows to read W_ih for in every step
    (loop(1, 64, steps=50), 2, False),
    (loop(128, 1024), 2, False),
    (loop(128, 1024, tile_rows=16, item=2), 2, True),   # pre-activations of 2 MB a step
    (loop(32, 1024, tile_rows=16, item=2), 2, False),
    (loop(20, 650, tile_rows=16, item=2), 2, False),
])
def test_x_in_the_step(problem, team, want):
    assert bool(choose_fused(problem, team)) is want


def test_chunk_has_rows_enough_and_no_more_steps_than_there_are():
    assert choose_chunk(loop(20, 650, steps=35), False) == 10    # 200 rows
    assert choose_chunk(loop(500, 650, steps=35), False) == 1
    assert choose_chunk(loop(1, 650, steps=35), False) == 35
    assert choose_chunk(loop(1, 650, steps=35), True) == 1
