"""The rewrites inside a plan, by the names with which `compile(skip=...)` leaves them out; docs/algebra.md
measures each."""

from __future__ import annotations

REWRITES: dict[str, str] = {
    "share_values": "candidates without parameters on one source are computed once for all edges",
    "delay_norms": "a normalisation is applied where its result is summed or convolved, never stored",
    "stage_activations": "an activation is applied while convolutions read, once for all of them",
    "merge_sums": "the weighted sums of a node's edges are one sum",
    "fuse_depthwise": "a depthwise convolution and the pointwise one behind it are one step",
    "place_parts": "what is concatenated is computed in its place",
    "gather_phases": "backward runs as late as it can, so that what reads one source runs together",
    "reuse_memory": "maps that are never needed at one time share memory",
}
"""What each does. All are exact up to the order of summation."""
