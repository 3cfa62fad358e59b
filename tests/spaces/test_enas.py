"""The two ENAS spaces against parameter formulas, shapes and keys worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nascompile import NascompileError
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.spaces import (
    ENASMacroGeneralModel,
    ENASMacroLayer,
    ENASMicroLayer,
    ENASMicroNetwork,
    enas_ops,
)
from tests.spaces.eager import RandomDecisions, decide, used_parameters


def macro_branch_parameters(op: int, c: int) -> int:
    """Candidates 0 to 5: 3x3, separable 3x3, 5x5, separable 5x5, average, max pooling; each after a 1x1."""
    if op >= 4:
        return c * c
    k = 3 if op < 2 else 5
    return c * c + (c * c * k * k + c if op % 2 == 0 else c * k * k + c * c)


def test_macro_parameters() -> None:
    c = 6
    model = ENASMacroGeneralModel(6, c, 3, 10)
    reader = RandomDecisions(model)
    operations = iter(range(6))
    # layer i takes operation i, and there are no skip connections
    chosen: dict = {
        key: next(operations) if isinstance(choice, LayerChoice) else []
        for key, choice in reader.choices_by_key.items()
    }
    reader.release()
    decide(model, chosen)
    expected = (
        3 * 9 * c + 2 * c + sum(macro_branch_parameters(op, c) for op in range(6)) + 2 * c * c + c * 10 + 10
    )
    assert used_parameters(model, torch.randn(2, 3, 16, 16)) == expected


def test_macro_scopes_keys_and_reductions() -> None:
    model = ENASMacroGeneralModel(num_layers=4, out_filters=4)
    mutator = RandomDecisions(model)
    scopes = [mutable.key for mutable in mutator.mutables if isinstance(mutable, MutableScope)]
    assert scopes == ["layer_0", "layer_1", "layer_2", "layer_3"]
    skips = [choice for choice in mutator.choices_by_key.values() if isinstance(choice, InputChoice)]
    assert [skip.choose_from for skip in skips] == [scopes[:1], scopes[:2], scopes[:3]]
    assert [skip.n_chosen for skip in skips] == [None] * 3
    assert model.pool_layers_idx == [0, 1]
    assert len(model.pool_layers) == 2
    mutator.reset()
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_macro_skip_connection_is_added() -> None:
    """In eval mode with fresh statistics BatchNorm is a division by sqrt(1 + eps)."""
    scope_a, scope_b = MutableScope("a"), MutableScope("b")
    layer = ENASMacroLayer("c", ["a", "b"], 4, 4)
    model = torch.nn.ModuleList([scope_a, scope_b, layer]).eval()
    mutator = RandomDecisions(model)
    op_key, skip_key = mutator.choices_by_key
    inputs = [torch.randn(1, 4, 5, 5) for _ in range(3)]
    op_mask = torch.tensor([False] * 5 + [True])
    outputs = []
    for skip_mask in ([False, False], [True, False], [True, True]):
        mutator.decide({op_key: op_mask, skip_key: torch.tensor(skip_mask)})
        outputs.append(layer(inputs).detach())
    scale = (1 + layer.batch_norm.eps) ** -0.5
    torch.testing.assert_close(outputs[1] - outputs[0], inputs[0] * scale)
    torch.testing.assert_close(outputs[2] - outputs[0], (inputs[0] + inputs[1]) * scale)


def micro_decision(kind: str, inputs: list[tuple[int, int]], ops: list[tuple[int, int]]) -> dict:
    chosen: dict = {}
    for i, (sources, operations) in enumerate(zip(inputs, ops, strict=True)):
        for half, source, operation in zip("xy", sources, operations, strict=True):
            chosen[f"{kind}_node_{i}_{half}_input"] = source
            chosen[f"{kind}_node_{i}_{half}_op"] = operation
    return chosen


def micro_op_parameters(op: int, c: int) -> int:
    k = {0: 3, 1: 5}.get(op)
    return 0 if k is None else c * k * k + c * c + 2 * c


MICRO_INPUTS = [(0, 1), (2, 0), (2, 2)]
MICRO_OPS = [(0, 1), (2, 3), (4, 0)]


@pytest.mark.parametrize("reduction", [False, True])
def test_micro_layer_parameters(reduction: bool) -> None:
    """Nodes 3 and 4 are loose ends: two of the five output convolutions are used."""
    c_pp, c_p, c = 6, 4, 8
    layer = ENASMicroLayer(3, c_pp, c_p, c, reduction)
    decide(layer, micro_decision("reduce" if reduction else "normal", MICRO_INPUTS, MICRO_OPS))
    pprev, prev = torch.randn(2, c_pp, 8, 8), torch.randn(2, c_p, 8, 8)
    # calibration and factorized reduction both have c_in * c_out weights
    expected = (
        (c_pp + c_p) * c + sum(micro_op_parameters(op, c) for pair in MICRO_OPS for op in pair) + 2 * c * c
    )
    assert used_parameters(layer, pprev, prev) == expected
    size = 4 if reduction else 8
    kept, out = layer(pprev, prev)
    assert out.shape == (2, c, size, size)
    assert kept.shape == ((2, c, 4, 4) if reduction else prev.shape)


def test_micro_output_is_one_convolution_over_the_loose_ends() -> None:
    layer = ENASMicroLayer(2, 4, 4, 4, reduction=False).double().eval()
    decide(layer, micro_decision("normal", [(0, 0), (0, 0)], [(4, 4), (2, 4)]))
    pprev, prev = torch.randn(2, 2, 4, 6, 6, dtype=torch.float64)
    average = F.avg_pool2d(pprev, 3, 1, 1, count_include_pad=False)
    # prev, and both nodes, are used by nobody
    loose = torch.cat([prev, 2 * pprev, average + pprev], dim=1).relu()
    weight = torch.cat([layer.final_convs[i].weight for i in (1, 2, 3)], dim=1)  # type: ignore[list-item]
    expected = F.conv2d(loose, weight) * (1 + layer.bn.eps) ** -0.5
    torch.testing.assert_close(layer(pprev, prev)[1], expected)


def test_micro_keys() -> None:
    layer = ENASMicroLayer(2, 4, 4, 4, reduction=True)
    mutator = RandomDecisions(layer)
    expected = [
        f"reduce_node_{i}_{half}_{what}" for i in range(2) for half in "xy" for what in ("input", "op")
    ]
    assert list(mutator.choices_by_key) == expected
    source = mutator.choices_by_key["reduce_node_1_y_input"]
    assert isinstance(source, InputChoice)
    assert source.choose_from == [InputChoice.NO_KEY, InputChoice.NO_KEY, "reduce_node_0"]
    assert source.n_chosen == 1


def test_micro_network_shapes_and_widths() -> None:
    model = ENASMicroNetwork(3, 4, 10, n_layers=3, n_nodes=2, use_aux=True)
    assert [layer.reduction for layer in model.layers] == [False, True, False, True, False]
    RandomDecisions(model).reset()
    logits, aux_logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == aux_logits.shape == (2, 10)
    assert model.dense.in_features == 16
    assert model.eval()(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_micro_network_parameters() -> None:
    c = 4
    model = ENASMicroNetwork(3, c, 10, n_layers=3, n_nodes=3)
    chosen = micro_decision("normal", MICRO_INPUTS, MICRO_OPS) | micro_decision(
        "reduce", MICRO_INPUTS, MICRO_OPS
    )
    decide(model, chosen)
    expected = 3 * 9 * 3 * c + 2 * 3 * c
    # per layer: channels of both inputs and of the layer; a 1x1 is there only where they differ
    for c_pp, c_p, width in ((12, 12, 4), (12, 4, 8), (8, 8, 8), (8, 8, 16), (16, 16, 16)):
        expected += sum(c_in * width for c_in in (c_pp, c_p) if c_in != width)
        expected += (
            sum(micro_op_parameters(op, width) for pair in MICRO_OPS for op in pair) + 2 * width * width
        )
    expected += 16 * 10 + 10
    assert used_parameters(model, torch.randn(2, 3, 16, 16)) == expected


def test_auxiliary_head_parameters() -> None:
    head = enas_ops.AuxiliaryHead(12, 7)
    assert sum(p.numel() for p in head.parameters()) == 12 * 128 + 128 * 768 + 768 * 7


def test_unknown_pooling() -> None:
    with pytest.raises(NascompileError, match="pool_type is 'min'"):
        enas_ops.Pool("min", 3, 1, 1)
