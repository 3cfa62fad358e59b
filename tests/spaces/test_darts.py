"""The DARTS space against parameter formulas, shapes and keys worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from nascompile import NascompileError
from nascompile.mutables import InputChoice
from nascompile.spaces import DartsCell, DartsNetwork, darts_ops
from nascompile.spaces.darts import CANDIDATES
from tests.spaces.eager import RandomDecisions, decide, used_parameters


def edge_parameters(name: str, channels: int, stride: int) -> int:
    """Convolution weights of one candidate; its BatchNorms have none."""
    if name == "skipconnect":
        return 0 if stride == 1 else channels * channels
    if "pool" in name:
        return 0
    k = int(name[-1])
    depthwise_separable = channels * k * k + channels * channels
    return 2 * depthwise_separable if name.startswith("sep") else depthwise_separable


def cell_decision(kind: str, n_nodes: int, names: Sequence[str], kept: tuple[int, int] = (0, 1)) -> dict:
    """Candidate names cycle over the edges; every node keeps the same two edges."""
    chosen: dict = {}
    for i in range(2, n_nodes + 2):
        for j in range(i):
            chosen[f"{kind}_n{i}_p{j}"] = names[(i + j) % len(names)]
        chosen[f"{kind}_n{i}_switch"] = list(kept)
    return chosen


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("reduction", [False, True])
def test_candidate_parameters_and_shape(name: str, reduction: bool) -> None:
    cell = DartsCell(1, 12, 10, 6, reduction_p=False, reduction=reduction)
    kind = "reduce" if reduction else "normal"
    decide(cell, cell_decision(kind, 1, [name]))
    pprev, prev = torch.randn(2, 12, 8, 8), torch.randn(2, 10, 8, 8)
    preprocessing = 12 * 6 + 10 * 6
    expected = preprocessing + 2 * edge_parameters(name, 6, 2 if reduction else 1)
    assert used_parameters(cell, pprev, prev) == expected
    assert cell(pprev, prev).shape == ((2, 6, 4, 4) if reduction else (2, 6, 8, 8))


def test_cell_after_a_reduction_halves_pprev() -> None:
    cell = DartsCell(2, 12, 24, 6, reduction_p=True, reduction=False)
    decide(cell, cell_decision("normal", 2, ["skipconnect"]))
    pprev, prev = torch.randn(2, 12, 8, 8), torch.randn(2, 24, 4, 4)
    assert used_parameters(cell, pprev, prev) == 12 * 6 + 24 * 6
    assert cell(pprev, prev).shape == (2, 12, 4, 4)


def test_keys_and_order() -> None:
    mutator = RandomDecisions(DartsNetwork(32, 3, 4, 10, n_layers=3, n_nodes=2))
    expected = []
    # cell 0 is normal, cells 1 and 2 are reduction cells
    for kind in ("normal", "reduce"):
        for i in (2, 3):
            expected += [f"{kind}_n{i}_p{j}" for j in range(i)] + [f"{kind}_n{i}_switch"]
    assert list(mutator.choices_by_key) == expected
    assert tuple(mutator.choices_by_key["normal_n3_p0"].names) == CANDIDATES  # type: ignore[union-attr]
    switch = mutator.choices_by_key["reduce_n3_switch"]
    assert isinstance(switch, InputChoice)
    assert switch.choose_from == ["reduce_n3_p0", "reduce_n3_p1", "reduce_n3_p2"]
    assert switch.n_chosen == 2


def test_network_parameters() -> None:
    """The whole network with one architecture, against the sum over stem, cells, heads."""
    channels, n_layers, n_nodes, n_classes = 4, 6, 3, 10
    names = list(CANDIDATES)
    model = DartsNetwork(32, 3, channels, n_classes, n_layers, n_nodes, auxiliary=True)
    decide(
        model,
        cell_decision("normal", n_nodes, names, kept=(0, 1))
        | cell_decision("reduce", n_nodes, names, kept=(0, 1)),
    )
    expected = 3 * 9 * (3 * channels) + 2 * (3 * channels)
    c_pp = c_p = 3 * channels
    width = channels
    for i in range(n_layers):
        reduction = i in (2, 4)
        width *= 2 if reduction else 1
        expected += (c_pp + c_p) * width
        for node in range(2, n_nodes + 2):
            for j in (0, 1):
                expected += edge_parameters(names[(node + j) % len(names)], width, 2 if reduction else 1)
        c_pp, c_p = c_p, n_nodes * width
        if i == 4:
            expected += c_p * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * n_classes + n_classes
    expected += c_p * n_classes + n_classes
    assert used_parameters(model, torch.randn(2, 3, 32, 32)) == expected


def test_paper_size() -> None:
    """C=16, 8 cells, 4 nodes: all candidates counted by formula."""
    model = DartsNetwork(32, 3, 16, 10, 8)
    expected = 3 * 9 * 48 + 2 * 48
    c_pp = c_p = 48
    width = 16
    for i in range(8):
        reduction = i in (2, 5)
        width *= 2 if reduction else 1
        expected += (c_pp + c_p) * width
        for node in range(2, 6):
            for j in range(node):
                stride = 2 if reduction and j < 2 else 1
                expected += sum(edge_parameters(name, width, stride) for name in CANDIDATES)
        c_pp, c_p = c_p, 4 * width
    expected += c_p * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected


def test_auxiliary_output_only_in_training() -> None:
    model = DartsNetwork(28, 1, 2, 7, n_layers=3, n_nodes=1, auxiliary=True)
    RandomDecisions(model).reset()
    logits, aux_logits = model(torch.randn(2, 1, 28, 28))
    assert logits.shape == aux_logits.shape == (2, 7)
    assert model.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 7)


def test_dropped_edges_leave_the_node_to_the_others() -> None:
    """The derived DARTS architecture zeroes the layer choices of dropped edges: their outputs are None."""
    cell = DartsCell(2, 4, 4, 4, reduction_p=False, reduction=False).train()
    mutator = decide(cell, cell_decision("normal", 2, ["skipconnect"]))
    x = torch.randn(2, 4, 8, 8)
    kept = cell(x, x)
    masks = dict(mutator.decision)
    masks["normal_n3_p2"] = torch.zeros(7, dtype=torch.bool)
    mutator.decide(masks)
    torch.testing.assert_close(cell(x, x), kept, rtol=0, atol=0)


def test_drop_path() -> None:
    drop = darts_ops.DropPath(0.25)
    x = torch.ones(4000, 2, 2, 2)
    y = drop(x)
    assert y is not None
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # one decision a sample
    assert torch.equal(y, y[:, :1, :1, :1].expand_as(y))
    # four standard deviations of the mean of 4000 Bernoulli(0.25)
    assert abs((y == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert drop.eval()(x) is x
    assert drop(None) is None


def test_drop_path_prob_reaches_every_node() -> None:
    model = DartsNetwork(32, 3, 2, 10, n_layers=3, n_nodes=2)
    model.drop_path_prob(0.3)
    drops = [module.p for module in model.modules() if isinstance(module, darts_ops.DropPath)]
    assert drops == [0.3] * 6


def test_factorized_convolution() -> None:
    conv = darts_ops.FacConv(4, 6, 7, 2, 3)
    assert sum(p.numel() for p in conv.parameters()) == 4 * 4 * 7 + 4 * 6 * 7 + 2 * 6
    assert conv(torch.randn(2, 4, 8, 8)).shape == (2, 6, 4, 4)


def test_factorized_reduce_reads_even_and_odd_pixels() -> None:
    reduce = darts_ops.FactorizedReduce(1, 3).eval()
    x = torch.rand(1, 1, 4, 4)
    with torch.no_grad():
        for conv in (reduce.conv1, reduce.conv2):
            conv.weight.fill_(1)
    scale = (1 + reduce.bn.eps) ** -0.5
    even, odd = x[0, 0, ::2, ::2] * scale, x[0, 0, 1::2, 1::2] * scale
    torch.testing.assert_close(reduce(x)[0].detach(), torch.stack([even, odd, odd]))


def test_errors_name_value_and_expectation() -> None:
    with pytest.raises(NascompileError, match=r"pool_type is 'median', expected \"max\" or \"avg\""):
        darts_ops.PoolBN("median", 4, 3, 1, 1)
    with pytest.raises(NascompileError, match="input_size is 16, expected 7"):
        DartsNetwork(64, 3, 4, 10, n_layers=3, auxiliary=True)
