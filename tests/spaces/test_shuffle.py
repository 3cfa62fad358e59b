"""The SPOS space against parameter formulas, keys and shapes worked out by hand."""

from __future__ import annotations

import pytest
import torch

from nascompile import NascompileError
from nascompile.spaces import ShuffleNetSpace
from nascompile.spaces.shuffle import CANDIDATES, STAGE_BLOCKS, STAGE_CHANNELS, ShuffleBlock
from tests.spaces.eager import RandomDecisions, decide, used_parameters


def block_parameters(name: str, c_in: int, c_out: int, stride: int) -> int:
    """Convolution weights of a block; its BatchNorms have none."""
    width = c_in // 2 if stride == 1 else c_in
    mid, out = c_out // 2, c_out - width
    k = 3 if name == "choice_x" else int(name[-1])
    if name == "choice_x":
        main = 9 * width + width * mid + 9 * mid + mid * mid + 9 * mid + mid * out
    else:
        main = width * mid + k * k * mid + mid * out
    return main + (k * k * width + width * width if stride == 2 else 0)


def test_parameters_of_a_fixed_architecture() -> None:
    model = ShuffleNetSpace(n_classes=10)
    chosen: dict = {}
    expected = 3 * 9 * 16
    channels = 16
    for s, (width, n_blocks) in enumerate(zip(STAGE_CHANNELS, STAGE_BLOCKS, strict=True)):
        for b in range(n_blocks):
            name = CANDIDATES[(s + b) % 4]
            chosen[f"stage{s}_block{b}"] = name
            expected += block_parameters(name, channels, width, 2 if b == 0 else 1)
            channels = width
    expected += 640 * 1024 + 1024 * 10
    decide(model, chosen)
    assert used_parameters(model, torch.randn(2, 3, 64, 64)) == expected


def test_keys_and_candidates() -> None:
    mutator = RandomDecisions(ShuffleNetSpace(n_classes=10))
    expected = [f"stage{s}_block{b}" for s, n_blocks in enumerate(STAGE_BLOCKS) for b in range(n_blocks)]
    assert list(mutator.choices_by_key) == expected
    assert len(expected) == 20
    assert all(tuple(c.names) == CANDIDATES for c in mutator.choices_by_key.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("sequence", ["pdp", "dpdpdp"])
def test_block_shapes_and_pass_through(sequence: str) -> None:
    x = torch.randn(2, 8, 6, 6)
    same = ShuffleBlock(8, 8, 5, 1, sequence)(x)
    assert same.shape == x.shape
    # the first half of the output is the even channels of the input
    assert torch.equal(same[:, :4], x[:, ::2])
    assert ShuffleBlock(8, 20, 7, 2, sequence)(x).shape == (2, 20, 3, 3)


def test_affine() -> None:
    plain, affine = (ShuffleNetSpace(10, affine=flag) for flag in (False, True))
    norms = [module for module in plain.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    difference = sum(p.numel() for p in affine.parameters()) - sum(p.numel() for p in plain.parameters())
    assert difference == sum(2 * norm.num_features for norm in norms)


def test_errors_name_value_and_expectation() -> None:
    with pytest.raises(NascompileError, match="channels 6 to 6 with stride 1, expected equal multiples of 4"):
        ShuffleBlock(6, 6, 3, 1)
    with pytest.raises(NascompileError, match="channels 8 to 8 with stride 2, expected an increase"):
        ShuffleBlock(8, 8, 3, 2)
    with pytest.raises(NascompileError, match="2 stage_channels and 1 stage_blocks"):
        ShuffleNetSpace(10, stage_channels=(8, 16), stage_blocks=(1,))
