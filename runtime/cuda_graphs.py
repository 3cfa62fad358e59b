"""CUDA graphs: a function's kernels recorded once and replayed without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from nascompile.kernels import capturing


class Recording(Protocol):
    """What a function did on a device, to be done again."""

    outputs: Any
    """What the function returned; each replay writes these tensors anew."""

    def replay(self) -> None:
        """Do it again, with the same memory."""
        ...


class Recorder(Protocol):
    """Records functions; those of one recorder never run at one time."""

    def aside(self, function: Callable[[], Any]) -> Any:
        """Carry out a function as it would be recorded: what is set up once has to be, before."""
        ...

    def record(self, function: Callable[[], Any]) -> Recording:
        """Record a function, without carrying it out; RuntimeError where it cannot be."""
        ...


class CudaRecording:
    """A CUDA graph, what it returned, and what it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, held: list[Any]) -> None:
        self._graph, self.outputs, self._held = graph, outputs, held

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def aside(self, function: Callable[[], Any]) -> Any:
        """Carry out a function on the stream that captures, between what is asked of the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = function()
        current.wait_stream(self._stream)
        return found

    def record(self, function: Callable[[], Any]) -> CudaRecording:
        """Capture a function as a CUDA graph; RuntimeError where it waits for the device, for one thing."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            return self._capture(graph, function)
        except RuntimeError:
            # torch leaves its own where a capture has become invalid
            torch.cuda.set_stream(current)
            raise

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], Any]) -> CudaRecording:
        # other threads, such as those that pin batches, go on meanwhile
        with (
            torch.cuda.device(self._device),
            capturing.holding() as held,
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            outputs = function()
        return CudaRecording(graph, outputs, held)
