"""The MBConv space against parameter formulas, keys and shapes worked out by hand."""

from __future__ import annotations

import pytest
import torch

from nascompile import NascompileError
from nascompile.spaces import MBConvNetwork
from nascompile.spaces.mbconv import CIFAR_STAGES, IMAGENET_STAGES, MBConv, Stage, block_candidates
from tests.spaces.eager import RandomDecisions, decide, used_parameters

NAMES = ["mb3_3x3", "mb6_3x3", "mb3_5x5", "mb6_5x5", "mb3_7x7", "mb6_7x7"]


def mbconv_parameters(c_in: int, c_out: int, k: int, expansion: int) -> int:
    hidden = c_in * expansion
    expand = c_in * hidden + 2 * hidden if expansion > 1 else 0
    return expand + hidden * k * k + 2 * hidden + hidden * c_out + 2 * c_out


def parameters(name: str, c_in: int, c_out: int) -> int:
    return 0 if name == "skip" else mbconv_parameters(c_in, c_out, int(name[-1]), int(name[2]))


@pytest.mark.parametrize(("make", "stages"), [("imagenet", IMAGENET_STAGES), ("cifar", CIFAR_STAGES)])
def test_parameters_of_a_fixed_architecture(make: str, stages: tuple[Stage, ...]) -> None:
    model = getattr(MBConvNetwork, make)(n_classes=10)
    chosen: dict = {}
    expected = 3 * 9 * 32 + 2 * 32 + mbconv_parameters(32, 16, 3, 1)
    channels = 16
    for s, stage in enumerate(stages):
        for b in range(stage.n_blocks):
            # the first block of every stage changes the width, so it has no skip
            name = [*NAMES, "skip"][(s + b) % 7] if b else NAMES[s]
            chosen[f"stage{s}_block{b}"] = name
            expected += parameters(name, channels, stage.channels)
            channels = stage.channels
    expected += 320 * 1280 + 2 * 1280 + 1280 * 10 + 10
    decide(model, chosen)
    assert used_parameters(model, torch.randn(2, 3, 32, 32)) == expected


def test_keys_and_candidates() -> None:
    mutator = RandomDecisions(MBConvNetwork.cifar())
    assert list(mutator.choices_by_key) == [
        *(f"stage{s}_block{b}" for s in range(5) for b in range(4)),
        "stage5_block0",
    ]
    for key, choice in mutator.choices_by_key.items():
        assert choice.names == (NAMES if key.endswith("block0") else [*NAMES, "skip"])


@pytest.mark.parametrize(("make", "size", "final"), [("imagenet", 64, 2), ("cifar", 32, 4)])
def test_strides(make: str, size: int, final: int) -> None:
    model = getattr(MBConvNetwork, make)(n_classes=10)
    RandomDecisions(model).reset()
    x = torch.randn(1, 3, size, size)
    assert model.blocks(model.stem(x)).shape == (1, 320, final, final)
    assert model.eval()(x).shape == (1, 10)


def test_residual_where_the_shape_is_kept() -> None:
    x = torch.randn(2, 8, 4, 4)
    for name, module in block_candidates(8, 8, 1).items():
        module.eval()
        expected = x + module.layers(x) if isinstance(module, MBConv) else x
        assert isinstance(module, MBConv) == (name != "skip")
        assert torch.equal(module(x), expected)
    changed = block_candidates(8, 12, 1)
    assert list(changed) == NAMES
    assert not any(module.residual for module in changed.values())
    assert list(block_candidates(8, 8, 2)) == NAMES


def test_own_stages() -> None:
    model = MBConvNetwork(5, stages=[Stage(16, 2, 1)], stem_stride=1)
    RandomDecisions(model).reset()
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert len(model.blocks[0]) == 7  # type: ignore[arg-type]


def test_errors_name_value_and_expectation() -> None:
    with pytest.raises(NascompileError, match="stages is empty"):
        MBConvNetwork(10, stages=[], stem_stride=1)
    with pytest.raises(NascompileError, match="stride 2 and channels 8 to 8, expected stride 1"):
        MBConv(8, 8, 3, 2, 3, residual=True)
