"""Whether plans can be trusted on a GPU: before the first one runs there, a small network of every kind of
step is compared with its definition. GPUs and compilers for them differ, and a wrong number says nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.mutables import LayerChoice
from nascompile.compiler.mutator import Mutator
from nascompile.kernels import capturing
from nascompile.kernels.plan.cuda import exact_products

TOLERANCE = 2e-4
"""Of the largest number in a tensor, for the sums of a small network in fp32."""
WIDTHS = (5, 32, 64)
"""Channels: every width of the kernels' blocks, the first one padded."""
WEIGHTS = (0.3, 0.1, 0.05, 0.2, 0.2, 0.15)
Decision = Mapping[str, Sequence[Any]]
DECISIONS: tuple[Decision, ...] = (
    {"first": WEIGHTS, "second": WEIGHTS[::-1]},
    # each candidate once: a step that is left out must leave nothing to those that are not
    *(
        {"first": [k == first for k in range(6)], "second": [k == second for k in range(6)]}
        for first, second in ((0, 3), (1, 5), (2, 4), (3, 0), (4, 1), (5, 2))
    ),
)

_VERDICTS: dict[torch.device, str | None] = {}
_LOCK = threading.Lock()
_THREAD = threading.local()


def why_not_trusted(device: torch.device) -> str | None:
    """Why plans are not run on the device, or None; the first question about a GPU takes the test.

    It compiles kernels for all widths, seconds to a minute, once for each machine: Triton keeps them.
    """
    # the kernels for CPUs are tested where they are built
    if device.type != "cuda" or getattr(_THREAD, "tests", False):
        return None
    if device not in _VERDICTS:
        if capturing.is_capturing(device):
            return (
                "the kernels have not been compared on this GPU yet: call the model once before the capture"
            )
        with _LOCK:
            if device not in _VERDICTS:
                try:
                    _VERDICTS[device] = _verdict(device)
                except torch.OutOfMemoryError:
                    # there may be room the next time
                    return "there is no memory left for the test of the kernels"
    return _VERDICTS[device]


def _verdict(device: torch.device) -> str | None:
    _THREAD.tests = True
    try:
        found = [problem for width in WIDTHS for problem in problems(device, width)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        found = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    finally:
        _THREAD.tests = False
    if not found:
        return None
    name = torch.cuda.get_device_name(device)
    return f"the kernels failed their test on {name} ({found[0]}, {len(found)} in all)"


# ----- the test


def problems(
    device: torch.device, channels: int, size: int = 12, decisions: Sequence[Decision] = DECISIONS
) -> list[str]:
    """What a small network of so many channels computes wrongly on the device, forward and backward, under
    each decision, in training and in evaluation; nothing of the caller's is touched."""
    # it uses regions, which ask for this test
    from nascompile.compiler.compiled import compile as compile_model

    # whatever the caller has set up
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast(device.type, enabled=False),
        exact_products(),
    ):
        # not torch.manual_seed: it seeds GPUs too
        torch.default_generator.manual_seed(0)
        exact = Specimen(channels).double()
        network = copy.deepcopy(exact).float().to(device)
        model = compile_model(network)
        mutators = Mutator(network), Mutator(exact)
        x = torch.randn(3, 3, size, size, dtype=torch.float64)
        found = []
        for is_training in (True, False):
            model.train(is_training)
            exact.train(is_training)
            for decision in decisions:
                expected = _step(exact, mutators[1], decision, x)
                ours = _step(model, mutators[0], decision, x.to(device, torch.float32))
                found += list(_differences(ours, expected))
    if not any(region.plans for entry in model.entries for region in entry.regions):
        found.append(f"no plan ran: {model.notes}")
    # the first call is compared with the program as written, which then runs instead
    return [*found, *map(str, model.islands)]


def _step(model: nn.Module, mutator: Mutator, decision: Decision, x: Tensor) -> dict[str, Tensor | None]:
    """Output, all gradients and all buffers."""
    masks = {key: torch.tensor(mask, device=x.device) for key, mask in decision.items()}
    masks = {key: m.to(x.dtype).requires_grad_() if m.is_floating_point() else m for key, m in masks.items()}
    mutator.decide(masks)
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    output = model(x)
    # another weight for every element: a sum alone would hide what is only at another place
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=x.dtype, device=x.device)
    (output * weights.view_as(output)).sum().backward()
    return {
        "output": output.detach(),
        "gradient of the input": x.grad,
        **{f"gradient of the decision {key}": mask.grad for key, mask in masks.items()},
        **{f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()},
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def _differences(ours: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> Iterator[str]:
    for name, right in expected.items():
        found = ours[name]
        if found is None or right is None:
            if (found is None) != (right is None):
                yield f"{name} is {'missing' if found is None else 'there, and should not be'}"
            continue
        # what a BatchNorm follows has no gradient but rounding
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        off = float((found.detach().cpu().double() - right.cpu().double()).abs().max()) / scale
        if not off <= TOLERANCE:
            yield f"{name} is {off:.1e} off"


# ----- the network


def _convolution(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, bias=False, **options)


def _separable(channels: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}
    return nn.Sequential(
        nn.ReLU(),
        _convolution(channels, channels, kernel, **options),
        _convolution(channels, channels, 1),
        nn.BatchNorm2d(channels),
    )


def _candidates(channels: int, stride: int) -> list[nn.Module]:
    pool = nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(channels, affine=False))
    depthwise = nn.Sequential(
        _convolution(channels, channels, 3, stride=stride, padding=1, groups=channels),
        nn.BatchNorm2d(channels, momentum=None),
        nn.ReLU6(),
    )
    return [
        _separable(channels, 3, stride),
        _separable(channels, 3, stride, 2),
        _separable(channels, 5, stride),
        pool,
        nn.AvgPool2d(3, stride, 1),
        depthwise,
    ]


class Specimen(nn.Module):
    """Two edges, one of them with stride 2; what they give is concatenated, gated and convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, gate = channels + 3, max(3, channels // 4)
        self.stem = nn.Sequential(_convolution(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.first = LayerChoice(_candidates(channels, 1), key="first")
        self.second = LayerChoice(_candidates(channels, 2), key="second")
        self.squeeze = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, gate, 1), nn.SiLU()),
            *(nn.Conv2d(gate, wide, 1), nn.Sigmoid()),
        )
        self.last = nn.Sequential(nn.Hardswish(), _convolution(wide, 7, 1), nn.BatchNorm2d(7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.second(x + self.first(x))
        y = torch.cat([y, y[:, 1:4] * y[:, :3]], 1)
        return self.last(y * self.squeeze(y))
