"""The gate of a benchmark: output and gradients of one step against fp64, next to eager PyTorch's own error.

A single bit in which a ReLU's input differs switches a gradient on or off, for eager PyTorch as for us. So
whole vectors are compared: the output, the gradients of all parameters as one vector, of all decisions, of
the inputs, and the buffers after the step (running statistics). Eager's error is the largest of three runs of
the same mathematics: in both memory layouts, and with every parameter moved by one rounding. One run alone
is sometimes exact by luck, and then a bound of twice its error means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nascompile.runtime.bench_peers import Decision
from nascompile.runtime.bench_subject import Call, Subject
from nascompile.runtime.randomness import seed_everything

FACTOR = 2.0
FLOOR = 1e-6
"""As tests/numerics.py: at most twice the error of eager fp32, or below the floor."""
GRADIENT_FLOOR = 1e-5
"""Of gradients: they sum over whole batches of maps, with other signs."""

Values = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Error:
    """Relative error of one vector, in the 2-norm, against fp64: ours, and eager PyTorch's."""

    name: str
    ours: float
    eager: float

    @property
    def allowed(self) -> float:
        """The most that passes."""
        floor = GRADIENT_FLOOR if "gradients" in self.name else FLOOR
        return max(floor, FACTOR * self.eager)

    @property
    def is_wrong(self) -> bool:
        """Whether it does not pass; nan does not."""
        return not self.ours <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: relative error {self.ours:.2g}, allowed {self.allowed:.2g}"


def values(
    subject: Subject,
    call: Call,
    decision: Decision,
    *,
    trained: nn.Module | None = None,
    with_inputs: bool = False,
    seed: int = 0,
) -> Values:
    """Everything that one step computes, as fp64 on the CPU; buffers and gradients are as before afterwards.

    trained: the module whose parameters are meant, if it is not the model. with_inputs: the gradients of the
    inputs too, which a training step does not ask for.
    """
    model = subject.model if trained is None else trained
    leaves = [*model.parameters(), *decision.logits.values()]
    buffers = list(model.buffers())
    before, gradients = cloned(buffers), [leaf.grad for leaf in leaves]
    given = subject.inputs
    for leaf in leaves:
        leaf.grad = None
    if with_inputs:
        subject.inputs = tree_map(_as_leaf, given)
    inputs = [t for t in tree_leaves(subject.inputs) if isinstance(t, Tensor) and t.requires_grad]
    seed_everything(seed)
    try:
        output = subject.forward_backward(call, decision)
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        return {
            "output": {str(i): _copied(t) for i, t in enumerate(outputs)},
            "gradients of the parameters": _gradients(model.named_parameters()),
            "gradients of the decision": _gradients(decision.logits.items()),
            "gradients of the inputs": _gradients((str(i), t) for i, t in enumerate(inputs)),
            "buffers": {n: _copied(b) for n, b in model.named_buffers() if b.is_floating_point()},
        }
    finally:
        subject.inputs = given
        put_back(buffers, before)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient


def exact_values(subject: Subject, call: Call, decision: Decision, *, with_inputs: bool) -> Values:
    """`values` in fp64. The subject and the decision stay in fp64."""
    subject.model.double()
    subject.inputs = tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, subject.inputs
    )
    decision.double()
    return values(subject, call, decision, with_inputs=with_inputs)


def is_random(one: Values, other: Values) -> bool:
    """Whether two runs of the same step under different seeds differ in kind: dropout."""
    return _distances(one, other)["output"] > 1e-3


def errors(found: Values, eager: Iterable[Values], exact: Values) -> list[Error]:
    """For each vector that `found` has: its error, and the largest of the runs of eager PyTorch."""
    ours = _distances(found, exact)
    plain = [_distances(one, exact) for one in eager]
    return [Error(name, error, max(other[name] for other in plain)) for name, error in ours.items()]


def cloned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of what the tensors hold, for `put_back`."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put_back(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give the tensors the values of their copies, in place."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def move_by_one_rounding(model: nn.Module) -> None:
    """Change every parameter by a unit in its last place, up or down at random, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            signs = torch.randint(0, 2, parameter.shape, device=parameter.device) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)


def quiet_dropout(model: nn.Module) -> list[nn.Module]:
    """Set the probability of every dropout layer to 0, in place; the layers that had another one."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    found = [module for module in model.modules() if isinstance(module, kinds) and module.p > 0]
    for module in found:
        module.p = 0.0
    return [*found]


def _distances(found: Values, exact: Values) -> dict[str, float]:
    return {name: _distance(part, exact[name]) for name, part in found.items() if part and exact.get(name)}


def _distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    if found.keys() != exact.keys() or any(found[name].shape != exact[name].shape for name in exact):
        return float("inf")
    difference = sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    size = sum(float(tensor.square().sum()) for tensor in exact.values()) ** 0.5
    return difference / size if size > 0 else difference


def _gradients(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    # no gradient and a gradient of zeros are the same to an optimizer without weight decay
    return {name: _copied(torch.zeros_like(t) if t.grad is None else t.grad) for name, t in named}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu().clone()


def _as_leaf(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value
