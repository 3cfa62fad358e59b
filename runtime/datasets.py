"""Readers of two file formats of small image data sets: CIFAR-10's binary version, and IDX (MNIST).

They need no torchvision and download nothing.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from nascompile.compiler.errors import NascompileError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
"""Per-channel mean and standard deviation of the training images scaled to 0..1."""

MNIST_MEAN = 0.1307
MNIST_STD = 0.3081

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE)
_CIFAR_FILES = {True: tuple(f"data_batch_{i}.bin" for i in range(1, 6)), False: ("test_batch.bin",)}
_GZIP_MAGIC = b"\x1f\x8b"
# the third byte of an IDX file (http://yann.lecun.com/exdb/mnist): big-endian element types
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MNIST_PREFIX = {True: "train", False: "t10k"}


def read_cifar10(folder: str | Path, *, train: bool = True, limit: int | None = None) -> TensorDataset:
    """CIFAR-10, binary version: normalised float32 images (N, 3, 32, 32), int64 labels (N,), in file order.

    `folder` holds `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, or a folder
    `cifar-10-batches-bin` that does. `limit` keeps the first so many images and reads no more files than that
    takes. Raises NascompileError for a missing file, a size that is not a whole number of records of 3073
    bytes, or a label above 9.
    """
    _check_limit(limit)
    root = _existing_folder(folder, "the CIFAR-10 binary files")
    nested = root / "cifar-10-batches-bin"
    root = nested if nested.is_dir() else root
    parts: list[np.ndarray] = []
    missing = math.inf if limit is None else limit
    for name in _CIFAR_FILES[train]:
        if missing > 0:
            parts.append(_read_cifar_batch(root / name))
            missing -= len(parts[-1])
    records = np.concatenate(parts)[:limit]
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    pixels = torch.from_numpy(records[:, 1:].astype(np.float32)).view(-1, *_CIFAR_SHAPE) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return TensorDataset((pixels - mean) / std, labels)


def read_mnist(folder: str | Path, *, train: bool = True, limit: int | None = None) -> TensorDataset:
    """MNIST, or a set in its form: normalised float32 images (N, 1, H, W), int64 labels (N,), in file order.

    `folder` holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte` (`t10k-...` for `train=False`),
    each plain or as `.gz`. `limit` keeps the first so many. Raises NascompileError for a missing or corrupt
    file, and for images and labels that do not fit together.
    """
    _check_limit(limit)
    root = _existing_folder(folder, "the MNIST files")
    image_path = _plain_or_gz(root, f"{_MNIST_PREFIX[train]}-images-idx3-ubyte")
    label_path = _plain_or_gz(root, f"{_MNIST_PREFIX[train]}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.dim() != 3 or images.dtype != torch.uint8:
        raise NascompileError(
            f"{image_path}: {_describe(images)}, expected unsigned bytes of shape (N, H, W)"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.uint8:
        raise NascompileError(
            f"{label_path}: {_describe(labels)}, expected unsigned bytes of shape ({len(images)},)"
        )
    scaled = (images[:limit].float().unsqueeze(1) / 255 - MNIST_MEAN) / MNIST_STD
    return TensorDataset(scaled, labels[:limit].long())


def read_idx(path: str | Path) -> Tensor:
    """The array in an IDX file, in its element type. The file may be gzipped, whatever its name.

    Raises NascompileError when the file is missing or is not a complete IDX file.
    """
    path = Path(path)
    data = _read_bytes(path)
    if data[:2] == _GZIP_MAGIC:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise NascompileError(
                f"{path}: broken gzip file ({error}), expected a gzipped IDX file"
            ) from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        known = ", ".join(f"{code:#04x}" for code in _IDX_TYPES)
        raise NascompileError(
            f"{path}: starts with {data[:4].hex() or 'nothing'}, expected an IDX header "
            f"(0000, a type of {known}, the number of dimensions)"
        )
    element, n_dims = np.dtype(_IDX_TYPES[data[2]]), data[3]
    start = 4 + 4 * n_dims
    if len(data) < start:
        raise NascompileError(
            f"{path}: {len(data)} bytes, expected a header of {start} for {n_dims} dimensions"
        )
    shape = struct.unpack(f">{n_dims}I", data[4:start])
    expected = start + element.itemsize * math.prod(shape)
    if len(data) != expected:
        raise NascompileError(f"{path}: {len(data)} bytes, expected {expected} for an array of shape {shape}")
    array = np.frombuffer(data, element, offset=start).reshape(shape)
    return torch.from_numpy(array.astype(element.newbyteorder("=")))


def _read_cifar_batch(path: Path) -> np.ndarray:
    data = _read_bytes(path)
    if not data or len(data) % _CIFAR_RECORD:
        raise NascompileError(
            f"{path}: {len(data)} bytes, expected a positive multiple of {_CIFAR_RECORD} "
            "(a label and 3x32x32 pixels each)"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR_RECORD)
    if records[:, 0].max() > 9:
        record = int(records[:, 0].argmax())
        raise NascompileError(f"{path}: record {record} has label {records[record, 0]}, expected 0 to 9")
    return records


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NascompileError(f"{path}: cannot be read ({error.strerror}), expected a data file") from error


def _existing_folder(folder: str | Path, content: str) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise NascompileError(f"{root}: not a folder, expected the folder with {content}")
    return root


def _plain_or_gz(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise NascompileError(f"{root}: has no {name} and no {name}.gz, expected one of them")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise NascompileError(f"limit is {limit}, expected at least 1 image, or None for all")


def _describe(array: Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} of shape {tuple(array.shape)}"
