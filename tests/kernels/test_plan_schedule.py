"""Which records share a launch: areas of memory against their floats one by one, and the order of jobs."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from nascompile.kernels.plan.steps import Map, Space, Tap
from nascompile.kernels.plan.triton_areas import Area, block_area, map_area, vectors, weights_area, whole
from nascompile.kernels.plan.triton_schedule import Job, dependencies, schedule


def floats_of(place: Map, images: int, taps: list[Tap]) -> set[int]:
    """Every float that a map and taps in it reach, one by one."""
    image = 0 if place.space == Space.scratch else place.image
    return {
        place.offset + tap.offset + n * image + h * place.row + w * place.pixel + c
        for tap in taps
        for n, h, w, c in product(
            range(images), range(place.height), range(place.width), range(place.channels)
        )
    }


@st.composite
def maps(draw: st.DrawFn) -> Map:
    """Maps that lie near one another, parts of concatenations and windows with steps among them."""
    channels = draw(st.integers(1, 6))
    pixel = draw(st.sampled_from([channels, 6, 8, 12]))
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    row = pixel * draw(st.integers(1, 4)) + draw(st.sampled_from([0, 0, 0, 1]))
    image = row * draw(st.integers(1, 4))
    space = draw(st.sampled_from([Space.slab, Space.slab, Space.scratch]))
    return Map(space, draw(st.integers(0, 24)), image, row, pixel, channels, height, width)


@given(maps(), maps(), st.integers(1, 3), st.lists(st.integers(-9, 9), min_size=1, max_size=3))
def test_areas_that_share_a_float_meet(one, other, images, offsets):
    taps = [Tap(offset, 0) for offset in offsets]
    first, second = map_area(one, images, taps), map_area(other, images)
    if one.space == other.space and floats_of(one, images, taps) & floats_of(other, images, [Tap(0, 0)]):
        assert first.meets(second)
    assert first.meets(second) == second.meets(first)


def test_parts_of_one_map_do_not_meet():
    parts = [Map(Space.slab, 7 + at, 96, 48, 24, count, 2, 2) for at, count in ((0, 8), (8, 12), (20, 4))]
    # every second row and column of the middle part
    parts.append(Map(Space.slab, 7 + 8, 96, 96, 48, 12, 1, 1))
    areas = [map_area(part, 3) for part in parts]
    met = {(i, j) for i in range(4) for j in range(i) if areas[i].meets(areas[j])}
    assert met == {(3, 1)}
    # what a tap reads of the first part may lie in the second
    assert map_area(parts[0], 3, [Tap(8, 0)]).meets(areas[1])


def test_other_areas():
    assert vectors(8, 3, -1) == [Area("slab", 3, 11)]
    assert weights_area(-1, (Tap(0, 0),), 4) == weights_area(5, (), 4) == []
    assert weights_area(5, (Tap(0, 2), Tap(9, 0)), 4) == [Area("slab", 5, 17)]
    assert whole(1).meets(whole(1))
    assert not whole(1).meets(whole(2))
    assert not block_area("slab", 0, 8).meets(block_area("work", 0, 8))
    assert not block_area("slab", 0, 8).meets(block_area("slab", 8, 1))


def job(kernel: str, reads: str, writes: str) -> Job:
    """A job on one-float areas that have names of one letter."""
    areas = ([block_area("slab", ord(letter), 1) for letter in letters] for letters in (reads, writes))
    return Job(kernel, {"BLOCK": 1}, (1, 1), [[0]], kernel, *areas)


def order(jobs: list[Job]) -> list[list[int]]:
    numbers = {id(job): number for number, job in enumerate(jobs)}
    return [[numbers[id(job)] for job in group] for group in schedule(jobs)]


def test_independent_jobs_of_one_kernel_share_a_launch():
    jobs = [job("f", "a", "b"), job("g", "a", "c"), job("f", "a", "d"), job("g", "b", "e")]
    # the second g waits for the first f: both g can run after both f
    assert order(jobs) == [[0, 2], [1, 3]]


def test_jobs_wait_for_what_they_read_and_overwrite():
    written_read = [job("f", "", "a"), job("f", "a", "b")]
    read_written = [job("f", "a", "b"), job("f", "c", "a")]
    both_written = [job("f", "b", "a"), job("f", "c", "a")]
    for jobs in (written_read, read_written, both_written):
        assert order(jobs) == [[0], [1]]
        assert dependencies(jobs) == [set(), {0}]
    assert order([job("f", "a", "b"), job("f", "a", "c")]) == [[0, 1]]


def test_other_blocks_are_other_launches():
    jobs = [job("f", "a", "b"), job("f", "a", "c")]
    jobs[1].block = {"BLOCK": 2}
    assert order(jobs) == [[0], [1]]


def test_shorter_chains_wait_for_longer_ones():
    # the second f comes after h: the first one waits for it, and its g for the second g
    jobs = [job("f", "", "a"), job("g", "a", "b"), job("h", "", "c"), job("f", "c", "d"), job("g", "d", "e")]
    assert order(jobs) == [[2], [0, 3], [1, 4]]


LETTERS = st.text("abcdef", max_size=2)


@given(st.lists(st.tuples(st.sampled_from("fgh"), LETTERS, LETTERS), max_size=14))
def test_groups_keep_the_order_of_the_program(rows):
    jobs = [job(*row) for row in rows]
    groups = order(jobs)
    at = {number: place for place, group in enumerate(groups) for number in group}
    assert sorted(at) == list(range(len(jobs)))
    for group in groups:
        assert len({jobs[number].kernel for number in group}) == 1
    for later, (_, reads, writes) in enumerate(rows):
        for earlier in range(later):
            _, before_reads, before_writes = rows[earlier]
            if set(before_writes) & {*reads, *writes} or set(before_reads) & set(writes):
                assert at[earlier] < at[later]
