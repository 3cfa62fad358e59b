"""What to compile ahead of time, to see registers and spills: every kernel of plans, all block sizes."""

from __future__ import annotations

from typing import Any

from nascompile.kernels.plan.cuda import kernels
from nascompile.kernels.plan.triton_blocks import (
    Block,
    add_up_block,
    barrier_block,
    block_of,
    dense_block,
    gradient_block,
)
from nascompile.kernels.triton_support import Compilation

_SIGNATURE = {
    "slab_ptr": "*fp32",
    "work_ptr": "*fp32",
    "table_ptr": "*i64",
    "flags_ptr": "*u8",
    "pointers_ptr": "*i64",
    "first": "i32",
    "images": "i32",
}
_WIDTHS = (16, 32, 64)
_TRUTHS = (False, True)


def _blocks(name: str) -> list[dict[str, Any]]:
    """The constants a kernel is called with."""
    found: list[Block]
    if name == "add_up":
        found = [add_up_block(is_sums) for is_sums in _TRUTHS]
    elif name in ("pack_depthwise", "pack_dense"):
        found = [{**barrier_block(packs=True), "PACKS": packs} for packs in _TRUTHS]
    elif name in ("normalise", "coefficients", "normalise_backward", "decision_gradient"):
        found = [barrier_block(packs=False)]
    elif name in ("dense", "separable"):
        found = [dense_block(width) for width in _WIDTHS]
    elif name == "dense_gradient":
        pairs = [(16, 16), (32, 16), (32, 64), (64, 16), (64, 64)]
        found = [{**gradient_block(*pair), "DEPTHWISE": truth} for pair in pairs for truth in _TRUTHS]
    elif name in ("pool", "pool_backward"):
        found = [{**block_of(width), "IS_MAX": is_max} for width in _WIDTHS for is_max in _TRUTHS]
    else:
        found = [block_of(width) for width in _WIDTHS]
    return [dict(block) for block in found]


def compilations() -> list[Compilation]:
    """Every kernel with every set of constants, matrix products in both precisions."""
    cases = []
    for name, (function, parameters) in kernels().items():
        for block in _blocks(name):
            for precision in ("ieee", "tf32") if "PRECISION" in parameters else (None,):
                constants = {key: value for key, value in block.items() if key != "num_warps"}
                if precision is not None:
                    constants["PRECISION"] = precision
                shown = " ".join(str(value) for value in constants.values())
                case = Compilation(
                    name=f"plan {name} {shown}",
                    function=function,
                    signature=_SIGNATURE,
                    constants=constants,
                    num_warps=block["num_warps"],
                )
                cases.append(case)
    return cases
