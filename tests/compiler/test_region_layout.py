"""Where channels lie in maps, and how they come from one layout to another."""

from __future__ import annotations

import pytest

from nascompile.compiler.region.layout import Layout, joined, runs, side_by_side, starts

FIVE, EIGHT, THREE = (side_by_side(channels, 8) for channels in (5, 8, 3))
TWELVE = side_by_side(12, 8)


def test_channels_are_padded_to_whole_vectors() -> None:
    assert Layout(((0, 5, 0),), 8) == FIVE
    assert Layout(((0, 12, 0),), 16) == TWELVE


def test_parts_without_gaps_are_one_segment() -> None:
    assert joined([EIGHT, EIGHT, EIGHT]) == side_by_side(24, 8)
    assert joined([EIGHT, FIVE]) == side_by_side(13, 8)
    assert joined([FIVE, EIGHT]) == Layout(((0, 5, 0), (5, 8, 8)), 16)


def test_concatenations_of_concatenations() -> None:
    inner = joined([THREE, FIVE])
    assert joined([inner, THREE]) == joined([THREE, FIVE, THREE])
    assert joined([EIGHT, inner]).segments == ((0, 11, 0), (11, 5, 16))
    assert starts([inner, THREE, TWELVE, EIGHT]) == [0, 16, 24, 40]
    assert inner.places() == [0, 1, 2, 8, 9, 10, 11, 12]
    assert inner.shifted(7) == ((7, 3, 0), (10, 5, 8))


@pytest.mark.parametrize(
    ("source", "target", "first", "step", "expected"),
    [
        (joined([THREE, FIVE]), EIGHT, 0, 1, [(0, 1, 0, 3), (8, 1, 3, 5)]),
        (EIGHT, joined([THREE, FIVE]), 0, 1, [(0, 1, 0, 3), (3, 1, 8, 5)]),
        (joined([FIVE, FIVE]), joined([THREE, THREE]), 2, 1, [(2, 1, 0, 3), (8, 1, 8, 3)]),
        (joined([FIVE, FIVE, FIVE]), FIVE, 1, 3, [(1, 3, 0, 2), (10, 3, 2, 1), (16, 3, 3, 2)]),
        (TWELVE, FIVE, 2, 2, [(2, 2, 0, 5)]),
    ],
)
def test_runs_bring_every_channel_to_its_place(source, target, first, step, expected) -> None:
    found = list(runs(source, target, first, step))
    assert found == expected
    brought = {to + k: at + k * by for at, by, to, count in found for k in range(count)}
    wanted = dict(zip(target.places(), source.places()[first::step], strict=False))
    assert brought == wanted
