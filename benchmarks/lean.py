"""The suite that holds a pruned network against the same network written by hand: eager, TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nascompile
from benchmarks.timing import time_on_cpu
from nascompile.spaces.nasbench201 import NASBench201Network

SECONDS = 12.0  # for all peers of one case together
BATCH, CHANNELS, CELLS = 32, 16, 1
# nodes 1, 2 and 3 of the cell; the kind that does best on CIFAR-10 in the tables of NAS-Bench-201
ARCHITECTURE = {"0_1": "conv_3x3", "0_2": "conv_3x3", "1_2": "conv_3x3"} | {
    "0_3": "skip_connect",
    "1_3": "conv_3x3",
    "2_3": "conv_3x3",
}


def conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """ReLU, 3x3 convolution, BatchNorm."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class HandwrittenCell(nn.Module):
    """The cell of ARCHITECTURE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c01, self.c02, self.c12, self.c13, self.c23 = (conv(channels, channels) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        node1 = self.c01(x)
        node2 = self.c02(x) + self.c12(node1)
        return x + self.c13(node1) + self.c23(node2)


class HandwrittenResidual(nn.Module):
    """Stride 2, twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = conv(channels, 2 * channels, 2), conv(2 * channels, 2 * channels)
        self.down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(channels, 2 * channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.b(self.a(x))


class Handwritten(nn.Module):
    """What one would write who knew the architecture from the start."""

    def __init__(self) -> None:
        super().__init__()
        widths = [CHANNELS * 2**stage for stage in range(3)]
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS))
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                layers.append(HandwrittenResidual(width // 2))
            layers.extend(HandwrittenCell(width) for _ in range(CELLS))
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.last(self.layers(self.stem(x))).mean((2, 3)))


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Forward and backward of a training step."""
    return lambda: model(x).sum().backward()


def inference(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """One forward without gradient."""

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def script(model: nn.Module, x: Tensor) -> Any:
    """The model as frozen TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit says at every step that it is deprecated
        return torch.jit.freeze(torch.jit.trace(model.eval(), x))


def copy_weights(hand: Handwritten, supernet: NASBench201Network) -> None:
    """Give the hand-written network the supernet's weights, layer by layer."""
    for own, other in (
        (hand.stem, supernet.stem),
        (hand.last, supernet.last),
        (hand.classifier, supernet.classifier),
    ):
        own.load_state_dict(other.state_dict())
    own: Any
    other: Any
    for own, other in zip(hand.layers, supernet.cells, strict=True):
        if isinstance(own, HandwrittenResidual):
            pairs = [(own.a, other.conv_a), (own.b, other.conv_b), (own.down, other.downsample)]
        else:
            places = {"c01": (1, 0), "c02": (2, 0), "c12": (2, 1), "c13": (3, 1), "c23": (3, 2)}
            pairs = [(getattr(own, n), other.layers[i][j]["conv_3x3"]) for n, (i, j) in places.items()]
        for mine, theirs in pairs:
            mine.load_state_dict(theirs.state_dict())


def difference(lean: nn.Module, hand: nn.Module, x: Tensor) -> str:
    """What distinguishes the two, or an empty string."""
    sizes = [sum(p.numel() for p in model.parameters()) for model in (lean, hand)]
    if sizes[0] != sizes[1]:
        return f"the lean network has {sizes[0]} parameters, the hand-written one {sizes[1]}"
    with torch.no_grad():
        found, expected = lean.eval()(x), hand.eval()(x)
    return "" if torch.allclose(found, expected, rtol=1e-4, atol=1e-5) else "the outputs differ"


def rows(*, compiled: bool) -> Iterator[list[dict[str, Any]]]:
    """One row per case and peer; `ratio` is the hand-written network's median over the lean network's.

    torch.compile is no peer here, whatever `compiled` says: the question is what the graph itself costs.
    """
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32)
    supernet = NASBench201Network(CHANNELS, CELLS)
    hand = Handwritten()
    copy_weights(hand, supernet)
    lean = nascompile.prune(supernet, ARCHITECTURE, x)
    models = {"nascompile lean": lean, "hand-written": hand}
    wrong = difference(lean, hand, x)
    cases: dict[str, Callable[[Any], Callable[[], object]]] = {
        "training step": lambda model: step(model.train(), x),
        "inference": lambda model: inference(model.eval(), x),
        "inference, TorchScript": lambda model: inference(script(model, x), x),
    }
    for case, prepare in cases.items():
        timings = time_on_cpu({name: prepare(model) for name, model in models.items()}, seconds=SECONDS)
        yield [
            {
                "suite": "lean",
                "name": "NAS-Bench-201",
                "case": case,
                "peer": name,
                "median": timing.median,
                "p20": timing.p20,
                "p80": timing.p80,
                "ratio": timings["hand-written"].median / timing.median if ours and not wrong else None,
                "wrong": wrong if ours else "",
            }
            for name, timing in timings.items()
            for ours in [name.startswith("nascompile")]
        ]
