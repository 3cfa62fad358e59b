"""What every test gets: fixed seed, fixed number of threads and, for kernels, fresh memory filled with nan.

Options: `--torch-seed N` varies the seed of every test (and lets hypothesis draw new examples),
`--torch-threads N` the threads of torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

KERNEL_TESTS = Path(__file__).resolve().parent / "kernels"
DEFAULT_SEED = 0

# asserts in the shared helpers explain themselves like those in tests
pytest.register_assert_rewrite("tests.numerics")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True, database=None)
hypothesis.settings.register_profile("varied", derandomize=False, deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nascompile")
    group.addoption("--torch-seed", type=int, default=DEFAULT_SEED, help="seed of every test (default 0)")
    group.addoption("--torch-threads", type=int, default=1, help="threads of torch in every test (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    varied = config.getoption("--torch-seed") != DEFAULT_SEED
    hypothesis.settings.load_profile("varied" if varied else "fixed")


def pytest_report_header(config: pytest.Config) -> str:
    seed, threads = config.getoption("--torch-seed"), config.getoption("--torch-threads")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, {device}, --torch-seed {seed}, --torch-threads {threads}"


@pytest.fixture(autouse=True)
def fixed_randomness(request: pytest.FixtureRequest) -> None:
    """Each test starts from the same random state and thread count, whatever ran before it."""
    seed: int = request.config.option.torch_seed
    threads: int = request.config.option.torch_threads
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests/kernels, every uninitialised tensor starts as nan (integers: the largest value).

    A kernel that leaves an element unwritten, or reads one before it is written, then fails instead of
    finding the zeros of a fresh page. torch fills in its own allocator: memory taken from C++ is filled too.
    """
    if KERNEL_TESTS not in request.path.parents:
        yield
        return
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # the fill belongs to deterministic mode; warn_only, for the fill is wanted, not the ban on algorithms
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
