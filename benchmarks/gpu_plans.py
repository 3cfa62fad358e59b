"""Plans on a GPU: are they right, how fast are whole networks, and how near is every kernel to the ceiling.

    python3 benchmarks/gpu_plans.py [--out folder] [--batch 64] [--seconds 420]

1. the tests of the kernels and of a whole region, on the GPU, where pytest and hypothesis are installed; in
   any case every gradient of a small network against the network in fp64;
2. forward and backward of DARTS and NAS-Bench-201 in fp32 (matrix products in fp32 too): ours, eager, eager
   in channels_last, each as a CUDA graph too, and torch.compile in max-autotune. Every peer runs in a process
   of its own with a time limit, so that none of them takes the others along;
3. every kernel's bytes, FLOPs and time, next to the bandwidth of a copy and the speed of a matrix product.

Results: gpu_plans.csv and gpu_plans.txt. The exit status is 1 where a comparison fails; then no ratio is
printed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.gpu import Log

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("nasbench201", "darts")
PEERS = ("ours", "ours graph", "eager", "eager graph", "channels_last", "channels_last graph", "compile")
TESTS = (
    "tests/kernels/test_plan_triton.py",
    "tests/kernels/test_plan_triton_barriers.py",
    "tests/kernels/test_plan_triton_sums.py",
    "tests/compiler/test_plan_triton.py",
)
COLUMNS = ["network", "batch", "peer", "median_ms", "p20_ms", "p80_ms", "peak_mib", "ratio", "note"]
DEVICE = torch.device("cuda")
PROGRAMS: list[Any] = []
"""What the executor ran, each program once."""


def use_triton() -> None:
    """Let regions run on the GPU whatever executors there are, and keep the programs."""
    from nascompile.compiler.region import region
    from nascompile.compiler.region.executors import Executor
    from nascompile.kernels.plan import cuda
    from nascompile.kernels.plan.run import run as run_plan

    on_device: dict[int, tuple[Tensor, Tensor]] = {}

    def run(
        program: Any, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
    ) -> None:
        if not any(program is known for known in PROGRAMS):
            PROGRAMS.append(program)
        if id(flags) not in on_device:
            # kept: a captured graph reads them
            on_device[id(flags)] = flags, flags.to(slab.device)
        run_plan(program, encoded, slab, work, on_device[id(flags)][1], tensors)

    triton = Executor(
        name="triton",
        device="cuda",
        dtype=torch.float32,
        lane=lambda: cuda.LANE,
        chunks=lambda images: 1,
        work=cuda.work_size,
        run=run,
        why_not=lambda: cuda.why_not(DEVICE),
    )
    region.EXECUTORS = (*(e for e in region.EXECUTORS if e.device != "cuda"), triton)


def network(name: str, *, small: bool = False) -> tuple[nn.Module, nn.Module]:
    """A network and its mutator, on the GPU."""
    from nascompile.darts import DartsMutator
    from nascompile.spaces import DartsNetwork, NASBench201Network

    torch.manual_seed(0)
    if name == "darts":
        model: nn.Module = DartsNetwork(32, 3, 16, 10, 3 if small else 8, n_nodes=2 if small else 4)
    else:
        model = NASBench201Network(16, 1 if small else 5)
    model = model.to(DEVICE)
    return model, DartsMutator(model).to(DEVICE)


def images(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (batch,), device=DEVICE)


def step_of(model: nn.Module, mutator: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Forward and backward with gradients of weights and of the architecture."""
    parameters = [*model.parameters(), *mutator.parameters()]

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        mutator.reset()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return step


def graphed(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(call: Callable[[], object], seconds: float = 5.0) -> dict[str, float]:
    from benchmarks.timing import summarise

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    found = []
    end = time.perf_counter() + seconds
    while len(found) < 50 and (time.perf_counter() < end or len(found) < 5):
        begin, finish = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        finish.record()
        finish.synchronize()
        found.append(begin.elapsed_time(finish))
    timing = summarise(found)
    return {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}


def measure_peer(name: str, peer: str, batch: int) -> dict[str, Any]:
    """What a process of its own does: time one peer."""
    import nascompile

    model: Any
    model, mutator = network(name)
    x, y = images(batch)
    kind = peer.removesuffix(" graph")
    run: Any = model
    if kind == "ours":
        use_triton()
        run = nascompile.compile(model)
    elif kind == "channels_last":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "compile":
        run = torch.compile(model, mode="max-autotune", dynamic=False)
    begin = time.perf_counter()
    step = step_of(run, mutator, x, y)
    step()
    torch.cuda.synchronize()
    note = f"first step {time.perf_counter() - begin:.1f} s"
    call = graphed(step) if peer.endswith("graph") else step
    row: dict[str, Any] = timed(call)
    if kind == "ours":
        note += f"; {len(PROGRAMS)} programs" if PROGRAMS else f"; no plan ran: {run.notes}"
    return {**row, "peak_mib": torch.cuda.max_memory_allocated() / 2**20, "note": note}


def in_process(name: str, peer: str, batch: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--network", name, "--peer", peer, "--batch", str(batch)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"note": f"not done after {seconds:.0f} s"}
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        return {"note": " ".join(result.stderr.strip().splitlines()[-1:])[-200:] or "failed"}
    return json.loads(lines[-1])


def check(log: Log) -> list[str]:
    """What is wrong, by the tests and by a small network."""
    wrong = []
    if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis")):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        log("\n".join(result.stdout.strip().splitlines()[-12:]))
        wrong += [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    else:
        log("pytest or hypothesis is not installed: the tests of single steps are left out")
    for name in NETWORKS:
        try:
            wrong += compare(log, name)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:400])
    return wrong


def compare(log: Log, name: str) -> list[str]:
    """Every gradient of a small network against fp64, relative to what eager fp32 achieves."""
    import nascompile

    use_triton()
    model, mutator = network(name, small=True)
    exact, exact_mutator = network(name, small=True)
    exact.double()
    x, y = images(8)
    compiled = nascompile.compile(model)
    found = {}
    plain = step_of(model, mutator, x, y)
    for peer, call, owner, choices in (
        ("eager", plain, model, mutator),
        ("ours", step_of(compiled, mutator, x, y), model, mutator),
        ("exact", step_of(exact, exact_mutator, x.double(), y), exact, exact_mutator),
    ):
        state = {key: value.clone() for key, value in owner.state_dict().items()}
        loss = call()
        named = [*owner.named_parameters(), *choices.named_parameters()]
        found[peer] = {"loss": loss.detach(), **{k: p.grad for k, p in named if p.grad is not None}}
        owner.load_state_dict(state)
    if not PROGRAMS:
        return [f"{name}: no plan ran: {compiled.notes}"]
    worst, wrong = 0.0, []
    for key, expected in found["exact"].items():
        size = max(float(expected.double().norm()), 1e-6 * expected.numel() ** 0.5)
        ours = float((found["ours"][key].double() - expected.double()).norm()) / size
        plain_error = float((found["eager"][key].double() - expected.double()).norm()) / size
        worst = max(worst, ours)
        if not ours <= max(5e-4, 3 * plain_error):
            wrong.append(f"{name}: {key}: error {ours:.2e}, eager's {plain_error:.2e}")
    log(f"{name} (small): {len(found['exact'])} tensors, largest error {worst:.2e}, {len(wrong)} wrong")
    return wrong


def kernels(log: Log, name: str, batch: int) -> None:
    """Time, bytes and FLOPs of every kernel in one step."""
    import nascompile
    from nascompile.kernels.plan.traffic import Traffic, count

    use_triton()
    PROGRAMS.clear()
    model, mutator = network(name)
    step = step_of(nascompile.compile(model), mutator, *images(batch))
    step()
    PROGRAMS.clear()
    step()
    # imported late: the package is built by benchmarks/gpu.py first

    counted: dict[str, Traffic] = defaultdict(Traffic)
    for program in PROGRAMS:
        for kernel, traffic in count(program).items():
            counted[kernel] += traffic
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:32]:
        traffic = counted.get(event.key.removesuffix("_kernel"))
        text = f"{event.key[:44]:44} x{event.count:<5} {event.self_device_time_total / 1e3:9.3f} ms"
        if traffic is not None and traffic.bytes:
            seconds = event.self_device_time_total / 1e6
            text += (
                f" {traffic.bytes / seconds / 1e9:8.0f} GB/s {traffic.flops / seconds / 1e12:7.2f} TFLOP/s"
            )
        log(text)


def ceilings(log: Log) -> None:
    """The bandwidth of a copy and the speed of fp32 matrix products."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copying = timed(lambda: target.copy_(source), 1.0)["median_ms"]
    a, b = torch.randn(2, 8192, 8192, device=DEVICE)
    product = timed(lambda: a @ b, 1.0)["median_ms"]
    log(
        f"copy: {2 * 2**30 / copying / 1e6:.0f} GB/s; fp32 product: {2 * 8192**3 / product / 1e9:.1f} TFLOP/s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=420, help="after so many no peer is begun")
    parser.add_argument("--network", choices=NETWORKS, help="time one peer, and print the row")
    parser.add_argument("--peer", choices=PEERS)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if options.peer:
        print(json.dumps(measure_peer(options.network, options.peer, options.batch)))
        return 0
    log = Log(options.out / "gpu_plans.txt")
    end = time.perf_counter() + options.seconds
    log(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {options.batch}")
    ceilings(log)
    wrong = check(log)
    for problem in wrong:
        log(f"WRONG: {problem}")
    rows = []
    # torch.compile last: it takes minutes
    for peer in PEERS:
        for name in NETWORKS:
            limit = min(120.0, end - time.perf_counter())
            row = in_process(name, peer, options.batch, limit) if limit > 5 else {"note": "no time left"}
            rows.append({"network": name, "batch": options.batch, "peer": peer, **row})
            log(f"{name:12} {peer:20} {row.get('median_ms', float('nan')):9.3f} ms  {row['note']}")
        if peer == "ours graph":
            for name in NETWORKS:
                try:
                    kernels(log, name, options.batch)
                except Exception as error:
                    log(f"no profile: {type(error).__name__}: {error}"[:300])
    write(options.out / "gpu_plans.csv", rows, wrong=bool(wrong))
    return 1 if wrong else 0


def write(path: Path, rows: list[dict[str, Any]], *, wrong: bool) -> None:
    """The rows, ours with the time of the fastest other peer over it."""
    for row in rows:
        others = [
            other["median_ms"]
            for other in rows
            if other["network"] == row["network"] and "ours" not in other["peer"] and "median_ms" in other
        ]
        if "ours" in row["peer"] and "median_ms" in row and others and not wrong:
            row["ratio"] = f"{min(others) / row['median_ms']:.2f}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
