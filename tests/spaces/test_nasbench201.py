"""The NAS-Bench-201 space against formulas and against the parameter counts that the benchmark publishes."""

from __future__ import annotations

import pytest
import torch

from nascompile.nasbench201 import NASBench201Cell as ReexportedCell
from nascompile.spaces import NASBench201Cell, NASBench201Network
from nascompile.spaces.nasbench201 import CANDIDATES
from tests.spaces.eager import RandomDecisions, decide, used_parameters

KEYS = ["0_1", "0_2", "1_2", "0_3", "1_3", "2_3"]


def test_keys_are_shared_whatever_the_cell_id() -> None:
    mutator = RandomDecisions(NASBench201Network(channels=4, n_cells=1))
    assert list(mutator.choices_by_key) == KEYS
    assert len(mutator.undedup_mutables) == 18
    choice = mutator.choices_by_key["0_1"]
    assert tuple(choice.names) == CANDIDATES  # type: ignore[union-attr]
    assert choice.reduction == "mean"
    assert ReexportedCell is NASBench201Cell


# published with the benchmark, in millions of parameters, for CIFAR-10
@pytest.mark.parametrize(("candidate", "published"), [("conv_3x3", 1.531546), ("skip_connect", 0.073306)])
def test_published_parameter_counts(candidate: str, published: float) -> None:
    model = NASBench201Network(channels=16, n_cells=5, n_classes=10)
    decide(model, dict.fromkeys(KEYS, candidate))
    assert used_parameters(model, torch.randn(2, 3, 8, 8)) == round(published * 1e6)


@pytest.mark.parametrize(("c_in", "c_out", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2), (4, 7, 2)])
def test_every_candidate_of_a_cell_that_changes_the_shape(c_in: int, c_out: int, stride: int) -> None:
    cell = NASBench201Cell("reduce", c_in, c_out, stride)
    mutator = RandomDecisions(cell)
    for candidate in range(len(CANDIDATES)):
        mask = torch.zeros(len(CANDIDATES), dtype=torch.bool)
        mask[candidate] = True
        mutator.decide(dict.fromkeys(KEYS, mask))
        out = cell(torch.randn(2, c_in, 8, 8))
        assert out.shape == (2, c_out, 8 // stride, 8 // stride)
        assert bool((out == 0).all()) == (candidate == 0)


def test_odd_sizes() -> None:
    cell = NASBench201Cell("reduce", 4, 8, 2)
    mutator = RandomDecisions(cell)
    for _ in range(10):
        mutator.reset()
        assert cell(torch.randn(2, 4, 7, 9)).shape == (2, 8, 4, 5)


def test_zero_ignores_what_it_is_given() -> None:
    cell = NASBench201Cell(0, 4, 4, 1)
    decide(cell, dict.fromkeys(KEYS, "none"))
    assert torch.equal(cell(torch.full((1, 4, 4, 4), torch.nan)), torch.zeros(1, 4, 4, 4))


def test_batch_norm_settings_reach_every_batch_norm() -> None:
    cell = NASBench201Cell(0, 4, 6, 2, bn_affine=False, bn_momentum=0.3, bn_track_running_stats=False)
    norms = [module for module in cell.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    # an edge has two convolutions; where the channels change also a skip, and the 1x1 before the pooling
    assert len(norms) == 3 * 4 + 3 * 2
    assert all(not n.affine and n.momentum == 0.3 and n.running_mean is None for n in norms)


def test_node_is_the_sum_of_its_edges() -> None:
    cell = NASBench201Cell(0, 2, 2, 1)
    decide(cell, dict.fromkeys(KEYS, "skip_connect"))
    x = torch.randn(1, 2, 3, 3)
    # node 1 = x, node 2 = 2x, node 3 = 4x
    assert torch.equal(cell(x), 4 * x)
