"""What every kernel owes, over `kernels.ALL`: each implementation this machine can run, each sample and type.

test_other_processes.py runs this file again under Triton's interpreter, and without the extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from nascompile.kernels import ALL, doctor_report, native
from nascompile.kernels.registry import Kernel, Sample, choose
from tests.numerics import assert_closer, assert_identical, in_fp64

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (kernel, implementation, device): None is what the public function takes by itself
IMPLEMENTATIONS = [
    (kernel, name, device)
    for kernel in ALL
    for device in DEVICES
    for name in (None, *(found.name for found in kernel.implementations if found.why_not(device) is None))
]
SAMPLES = [(kernel, sample) for kernel in ALL for sample in kernel.samples()]


def name_of(value: Any) -> str | None:
    if isinstance(value, Kernel | Sample):
        return value.name.replace(" ", "_")
    if isinstance(value, torch.device | torch.dtype):
        return str(value).removeprefix("torch.")
    return "default" if value is None else None


over_implementations = pytest.mark.parametrize(
    ("kernel", "implementation", "device"), IMPLEMENTATIONS, ids=name_of
)


def run(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradient of every tensor that requires one, for a gradient that varies."""
    out = function(*arguments)
    ramp = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
    grad = torch.sin(ramp).reshape(out.shape).to(out.dtype)
    wanted = [
        tensor for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor) and tensor.requires_grad
    ]
    return out, list(torch.autograd.grad(out, wanted, grad))


def layout(tensor: Tensor) -> list[int]:
    """The strides that mean something."""
    if tensor.numel() == 0:
        return []
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@over_implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_output_and_every_gradient_are_as_exact_as_the_reference(kernel, implementation, device, dtype):
    for sample in kernel.samples():
        arguments = sample.make(dtype, device)
        out, grads = run(lambda *a: kernel.function(*a, implementation=implementation), arguments)
        plain, plain_grads = run(kernel.reference, arguments)
        exact, exact_grads = run(kernel.reference, in_fp64(arguments))
        name = f"{kernel.name} {sample.name}"
        assert_closer(out, plain, exact, name=f"{name}: output")
        for position, (grad, plain_grad, exact_grad) in enumerate(
            zip(grads, plain_grads, exact_grads, strict=True)
        ):
            assert_closer(grad, plain_grad, exact_grad, name=f"{name}: gradient {position}")


@over_implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_type_and_memory_format_follow_the_expression_it_replaces(kernel, implementation, device, dtype):
    for sample in kernel.samples():
        arguments = sample.make(dtype, device)
        out, eager = kernel.function(*arguments, implementation=implementation), kernel.eager(*arguments)
        assert out.dtype == eager.dtype, sample.name
        assert layout(out) == layout(eager), sample.name


@over_implementations
def test_gradients_and_second_gradients_are_those_of_the_function(kernel, implementation, device):
    for sample in kernel.samples():
        arguments = sample.make(torch.float64, device)
        flat, spec = tree_flatten(arguments)
        if flat[0].numel() == 0:
            continue

        def function(*values: Tensor, spec: Any = spec) -> Tensor:
            return kernel.function(*tree_unflatten(list(values), spec), implementation=implementation)

        assert torch.autograd.gradcheck(function, flat, fast_mode=True), sample.name
        assert torch.autograd.gradgradcheck(function, flat, fast_mode=True), sample.name


@pytest.mark.parametrize("device", DEVICES, ids=name_of)
@pytest.mark.parametrize(("kernel", "sample"), SAMPLES, ids=name_of)
def test_opcheck(kernel, sample, device):
    for operator, arguments in kernel.operations(*sample.make(torch.float64, device)):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("device", DEVICES, ids=name_of)
@pytest.mark.parametrize("kernel", ALL, ids=name_of)
def test_compiles_into_one_graph_with_the_same_numbers(kernel, device):
    for sample in kernel.samples()[:4]:
        torch._dynamo.reset()
        arguments = sample.make(torch.float32, device)
        compiled = torch.compile(kernel.function, fullgraph=True, backend="aot_eager")
        out, grads = run(compiled, arguments)
        expected, expected_grads = run(kernel.function, arguments)
        assert_identical(out, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_identical(grad, expected_grad)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@over_implementations
def test_repeats_bit_for_bit(kernel, implementation, device, threads):
    # the sums of our kernels do not depend on the number of threads; those of torch, and the reference, do
    counts = (1, 1) if implementation == "reference" or not native.load()[0] else (1, 2, 3)
    for sample in kernel.samples():
        arguments = sample.make(torch.float32, device)
        results = []
        for count in counts:
            threads(count)
            out, grads = run(lambda *a: kernel.function(*a, implementation=implementation), arguments)
            results.append([out, *grads])
        for other in results[1:]:
            for first, second in zip(results[0], other, strict=True):
                assert_identical(second, first, name=sample.name)


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
def test_a_request_that_cannot_be_honoured_says_why(kernel):
    arguments = kernel.samples()[0].make(torch.float32, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"there is no implementation 'tritn'; there are: .*triton.*reference"
    ):
        kernel.function(*arguments, implementation="tritn")
    with pytest.raises(
        ValueError, match="'cuda' cannot be used on cpu: the CUDA kernels are for NVIDIA GPUs"
    ):
        kernel.function(*arguments, implementation="cuda")


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
def test_the_reference_is_last_and_never_declines(kernel):
    assert kernel.implementations[-1].name == "reference"
    for device in ("cpu", "cuda", "meta", "mps"):
        assert kernel.implementations[-1].why_not(torch.device(device)) is None
        assert choose(kernel, torch.device(device)).why_not(torch.device(device)) is None


def test_the_report_names_one_implementation_in_use_and_a_reason_for_each_other():
    rows = doctor_report()
    for kernel in ALL:
        for device in DEVICES:
            mine = [row for row in rows if (row.operation, row.device) == (kernel.name, str(device))]
            assert [row.implementation for row in mine] == [found.name for found in kernel.implementations]
            assert [row.implementation for row in mine if row.used] == [choose(kernel, device).name]
            assert all(row.reason for row in mine)
