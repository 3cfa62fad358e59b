"""The C++ extension: every instruction set that this processor has, and what its operators refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nascompile.kernels import mixed_sum, native
from tests.numerics import assert_closer, in_fp64

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def extension() -> Iterator[ModuleType]:
    module, reason = native.load()
    if module is None:
        pytest.skip(str(reason))
    before = module.selected_instruction_set()
    yield module
    module.select_instruction_set(before)


def test_the_extension_is_there_where_it_was_demanded():
    if os.environ.get("NASCOMPILE_BUILD_EXT") != "1":
        pytest.skip("NASCOMPILE_BUILD_EXT=1 demands it")
    assert native.load() == (native.load()[0], None)


@pytest.mark.parametrize(
    ("variable", "most"), [("default", "DEFAULT"), ("avx2", "AVX2"), ("avx512", "AVX512")]
)
def test_what_limits_torch_limits_the_kernels(extension, variable, most):
    program = "from nascompile.kernels import native; print(native.load()[0].selected_instruction_set())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": variable}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    order = ["DEFAULT", "AVX2", "AVX512"]
    usual = order.index(extension.selected_instruction_set())
    assert found.stdout.strip() == order[min(usual, order.index(most))]


def test_operators_in_cpp_and_in_python_have_one_schema():
    text = (ROOT / "csrc" / "ops.cpp").read_text()
    assert tuple(re.findall(r'm\.def\("(.*)"\);', text)) == mixed_sum.SCHEMAS


@pytest.mark.parametrize("name", ["DEFAULT", "AVX2", "AVX512"])
@pytest.mark.parametrize("dtype", mixed_sum.DTYPES)
def test_every_instruction_set_computes_the_same(extension, name, dtype):
    try:
        extension.select_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert extension.selected_instruction_set() == name
    for sample in mixed_sum.samples():
        inputs, weights = sample.make(dtype, torch.device("cpu"))
        grad = torch.randn_like(inputs[0])
        flags = [True] * len(inputs)
        wide_inputs, wide_weights = in_fp64((inputs, weights))
        assert_closer(
            torch.ops.nascompile.mixed_sum(inputs, weights),
            mixed_sum.reference(inputs, weights),
            mixed_sum.reference(wide_inputs, wide_weights),
            name=sample.name,
        )
        products, dots = torch.ops.nascompile.mixed_sum_backward(grad, inputs, weights, flags, True)
        plain = mixed_sum.reference_backward(grad, inputs, weights, flags, True)
        exact = mixed_sum.reference_backward(grad.double(), wide_inputs, wide_weights, flags, True)
        assert_closer(dots, plain[1], exact[1], name=f"{sample.name}: dots")
        for found, expected, best in zip(products, plain[0], exact[0], strict=True):
            assert_closer(found, expected, best, name=f"{sample.name}: product")


def test_an_unknown_instruction_set_is_refused(extension):
    with pytest.raises(ValueError, match="instruction set SSE9 is not built in"):
        extension.select_instruction_set("SSE9")


def test_operators_refuse_what_does_not_fit(extension):
    operator = torch.ops.nascompile.mixed_sum
    with pytest.raises(RuntimeError, match="1 to 16 tensors are needed, there are 17"):
        operator([torch.ones(2)] * 17, torch.ones(17))
    with pytest.raises(RuntimeError, match="weights must be a vector of 2 entries"):
        operator([torch.ones(2)] * 2, torch.ones(3))
    with pytest.raises(RuntimeError, match="weights must be fp32, or fp64 where the tensors are"):
        operator([torch.ones(2)] * 2, torch.ones(2).double())
    with pytest.raises(RuntimeError, match="all tensors must have one shape"):
        operator([torch.ones(2), torch.ones(3)], torch.ones(2))
    with pytest.raises(RuntimeError, match="all tensors must have one type"):
        operator([torch.ones(2), torch.ones(2).half()], torch.ones(2))
