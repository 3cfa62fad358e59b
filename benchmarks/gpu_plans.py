"""Plans on a GPU: are they right, how fast are whole networks, and how near is every kernel to the ceiling.

    python3 benchmarks/gpu_plans.py [--out folder] [--seconds 420] [--cases darts:64:fp32,...]

1. the self-test that decides whether models run on plans here at all; the tests of the kernels and of a whole
   region, where pytest and hypothesis are installed; every gradient of small networks against fp64;
2. per case (network, batch, type), forward and backward: ours, eager, eager in channels_last, each as a CUDA
   graph too, and torch.compile in max-autotune; and a whole step of a first-order DARTS search with both
   optimizers: ours with and without replays, and eager. Every peer runs in a process of its own with a time
   limit, so that none of them takes the others along. fp32 is fp32 in matrix products too;
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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.gpu import Log

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("nasbench201", "darts")
CASES = ("darts:64:fp32", "nasbench201:64:fp32", "darts:256:fp32", "darts:64:bf16", "darts:256:bf16")
"""In the order of their importance: time may run out."""
STEPS = ("ours", "ours graph", "eager", "eager graph", "channels_last", "channels_last graph")
SEARCHES = ("ours search", "ours search without graph", "eager search")
PEERS = (*STEPS, *SEARCHES, "compile")
TESTS = (
    "tests/kernels/test_plan_triton.py",
    "tests/kernels/test_plan_triton_barriers.py",
    "tests/kernels/test_plan_triton_sums.py",
    "tests/kernels/test_plan_triton_groups.py",
    "tests/kernels/test_plan_triton_flags.py",
    "tests/compiler/test_plan_triton.py",
)
COLUMNS = ["network", "batch", "type", "peer", "median_ms", "p20_ms", "p80_ms", "peak_mib", "ratio", "note"]
DEVICE = torch.device("cuda")


def programs(model: Any) -> list[Any]:
    """The programs of a compiled model's plans."""
    plans = [plan for entry in model.entries for region in entry.regions for plan in region.plans]
    return [way.program for plan in plans for way in (plan.forward, plan.backward) if way is not None]


def no_plan(model: Any) -> str:
    """What to say where no plan ran."""
    return f"no plan ran: {model.notes or [str(island) for island in model.islands]}"


def network(name: str, *, small: bool = False) -> tuple[nn.Module, Any]:
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


def step_of(
    model: nn.Module, mutator: Any, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Forward and backward with gradients of weights and of the architecture; under autocast for other types
    than fp32."""
    parameters = [*model.parameters(), *mutator.parameters()]
    casts = torch.autocast("cuda", dtype) if dtype != torch.float32 else nullcontext()

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        mutator.reset()
        with casts:
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return step


def graphed(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    from nascompile.runtime.cuda_graphs import CudaRecorder

    recorder = CudaRecorder(DEVICE)
    for _ in range(3):
        recorder.aside(step)
    return recorder.record(step).replay


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


def measure_peer(name: str, batch: int, kind: str, peer: str) -> dict[str, Any]:
    """What a process of its own does: time one peer."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    begin = time.perf_counter()
    if peer in SEARCHES:
        step, model = search_step(name, batch, kind, peer)
    else:
        step, model = training_step(name, batch, dtype, peer)
    torch.cuda.synchronize()
    note = f"first step {time.perf_counter() - begin:.1f} s"
    row: dict[str, Any] = timed(step)
    if peer.startswith("ours"):
        made = programs(model)
        note += f"; {len(made)} programs" if made else f"; {no_plan(model)}"
    return {**row, "peak_mib": torch.cuda.max_memory_allocated() / 2**20, "note": note}


def training_step(
    name: str, batch: int, dtype: torch.dtype, peer: str
) -> tuple[Callable[[], object], nn.Module]:
    """Forward and backward by a peer, run once or captured, and the model that it calls."""
    import nascompile

    model, mutator = network(name)
    x, y = images(batch)
    kind = peer.removesuffix(" graph")
    run: Any = model
    if kind == "ours":
        run = nascompile.compile(model)
    elif kind == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "compile":
        run = torch.compile(model, mode="max-autotune", dynamic=False)
    step = step_of(run, mutator, x, y, dtype)
    step()
    return graphed(step) if peer.endswith("graph") else step, run


def search_step(name: str, batch: int, kind: str, peer: str) -> tuple[Callable[[], object], Any]:
    """A whole step of a DARTS search with fixed batches, and the compiled model."""
    from torch.utils.data import TensorDataset

    from nascompile.darts import DartsTrainer

    model, mutator = network(name)
    x, y = images(batch)
    data = TensorDataset(x.cpu(), y.cpu())
    trainer: Any = DartsTrainer(
        *(model, nn.functional.cross_entropy, None),
        torch.optim.SGD(model.parameters(), 0.025, momentum=0.9, weight_decay=3e-4),
        *(1, data, data, mutator),
        batch_size=batch,
        device=DEVICE,
        compile=peer.startswith("ours"),
        cuda_graph=peer == "ours search",
        precision="bf16" if kind == "bf16" else "no",
    )
    trainer.set_training(True)
    train = trainer.split((x, y))

    def step() -> object:
        return trainer._search_step(train, train)

    # the first few set up, one is recorded
    for _ in range(8):
        step()
    captured = getattr(trainer._search_step, "captured", None)
    if peer == "ours search" and (captured is None or not captured.replays):
        raise RuntimeError(f"no step was replayed: {captured and captured.reason}")
    return step, trainer.compiled


def in_process(case: str, peer: str, seconds: float) -> dict[str, Any]:
    """Time a peer in a process of its own."""
    command = [sys.executable, __file__, "--cases", case, "--peer", peer]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"note": f"not done after {seconds:.0f} s"}
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        return {"note": " ".join(result.stderr.strip().splitlines()[-1:])[-200:] or "failed"}
    return json.loads(lines[-1])


def check(log: Log) -> list[str]:
    """What is wrong, by the self-test, the tests and small networks."""
    from nascompile.compiler.region.selftest import why_not_trusted

    begin = time.perf_counter()
    reason = why_not_trusted(torch.device("cuda", 0))
    log(f"self-test: {reason or 'passed'}, {time.perf_counter() - begin:.1f} s with all compilations")
    wrong = [] if reason is None else [f"self-test: {reason}"]
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
    if not programs(compiled):
        return [f"{name}: {no_plan(compiled)}"]
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
    # imported late: the package is built by benchmarks/gpu.py first
    import nascompile
    from nascompile.kernels.plan.traffic import Traffic, count

    model, mutator = network(name)
    compiled = nascompile.compile(model)
    step = step_of(compiled, mutator, *images(batch))
    for _ in range(2):
        step()
    counted: dict[str, Traffic] = defaultdict(Traffic)
    for program in programs(compiled):
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


def measure(log: Log, cases: list[str], end: float) -> list[dict[str, Any]]:
    """A row for each case and peer, as far as time allows; torch.compile last, for it takes minutes."""
    rows = []
    plan = [(case, peer) for case in cases for peer in PEERS[:-1]] + [(case, PEERS[-1]) for case in cases]
    for case, peer in plan:
        limit = min(120.0, end - time.perf_counter())
        row = in_process(case, peer, limit) if limit > 5 else {"note": "no time left"}
        network, batch, kind = case.split(":")
        rows.append({"network": network, "batch": batch, "type": kind, "peer": peer, **row})
        log(f"{case:20} {peer:26} {row.get('median_ms', float('nan')):9.3f} ms  {row['note']}")
        if peer == "ours graph" and case == cases[0]:
            try:
                kernels(log, network, int(batch))
            except Exception as error:
                log(f"no profile: {type(error).__name__}: {error}"[:300])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--cases", default=",".join(CASES), help="network:batch:type, by commas")
    parser.add_argument("--seconds", type=float, default=420, help="after so many no peer is begun")
    parser.add_argument("--peer", choices=PEERS, help="time one peer of one case, and print the row")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    cases = options.cases.split(",")
    if options.peer:
        network, batch, kind = cases[0].split(":")
        print(json.dumps(measure_peer(network, int(batch), kind, options.peer)))
        return 0
    log = Log(options.out / "gpu_plans.txt")
    end = time.perf_counter() + options.seconds
    log(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    ceilings(log)
    wrong = check(log)
    for problem in wrong:
        log(f"WRONG: {problem}")
    write(options.out / "gpu_plans.csv", measure(log, cases, end), wrong=bool(wrong))
    return 1 if wrong else 0


def write(path: Path, rows: list[dict[str, Any]], *, wrong: bool) -> None:
    """The rows, ours with the time of the fastest other peer over it: steps among steps, searches among
    searches."""
    for row in rows:
        others = [other["median_ms"] for other in rows if "median_ms" in other and _is_peer(row, other)]
        if "median_ms" in row and others and not wrong:
            row["ratio"] = f"{min(others) / row['median_ms']:.2f}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _is_peer(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    case = ("network", "batch", "type")
    kinds = {row["peer"] in SEARCHES for row in (ours, other)}
    same = all(ours[name] == other[name] for name in case) and len(kinds) == 1
    return same and "ours" in ours["peer"] and "ours" not in other["peer"]


if __name__ == "__main__":
    sys.exit(main())
