"""NNI's import path for small helpers."""

from nascompile.compiler.space import StructuredMutableTreeNode
from nascompile.runtime.batches import to_device, to_list
from nascompile.runtime.meters import AverageMeter, AverageMeterGroup, global_mutable_counting

__all__ = [
    "AverageMeter",
    "AverageMeterGroup",
    "StructuredMutableTreeNode",
    "global_mutable_counting",
    "to_device",
    "to_list",
]
