"""The data set readers, on tiny files written here, whole and broken."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.datasets import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    MNIST_MEAN,
    MNIST_STD,
    read_cifar10,
    read_idx,
    read_mnist,
)


def write_cifar(path: Path, labels: list[int], seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
    path.write_bytes(records.tobytes())
    return pixels


def write_idx(path: Path, array: np.ndarray, code: int = 0x08) -> None:
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, count: int = 5, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(1).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", labels)
    return images, labels


def test_cifar_test_batch(tmp_path: Path) -> None:
    pixels = write_cifar(tmp_path / "test_batch.bin", [3, 9, 0])
    images, labels = read_cifar10(tmp_path, train=False).tensors
    assert images.dtype == torch.float32
    assert labels.tolist() == [3, 9, 0]
    # record 2, green, row 1, column 4
    green = pixels[2, 1024 + 32 + 4] / 255
    assert images[2, 1, 1, 4].item() == pytest.approx((green - CIFAR10_MEAN[1]) / CIFAR10_STD[1], rel=1e-6)


def test_cifar_training_files_in_order_and_limit(tmp_path: Path) -> None:
    nested = tmp_path / "cifar-10-batches-bin"
    nested.mkdir()
    for i in range(1, 6):
        write_cifar(nested / f"data_batch_{i}.bin", [i, i], seed=i)
    assert read_cifar10(tmp_path).tensors[1].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    # three images need two files: the others may be absent
    for i in (3, 4, 5):
        (nested / f"data_batch_{i}.bin").unlink()
    assert read_cifar10(tmp_path, limit=3).tensors[1].tolist() == [1, 1, 2]
    with pytest.raises(NascompileError, match=r"data_batch_3\.bin: cannot be read \(No such file"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected a positive multiple of 3073"),
        (bytes(3072), "3072 bytes, expected a positive multiple of 3073"),
        (bytes(3073) + b"\x0a" + bytes(3072), "record 1 has label 10, expected 0 to 9"),
    ],
)
def test_broken_cifar(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(NascompileError, match=r"test_batch\.bin: " + message):
        read_cifar10(tmp_path, train=False)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path: Path, suffix: str) -> None:
    images, labels = write_mnist(tmp_path, suffix=suffix)
    read_images, read_labels = read_mnist(tmp_path, train=False).tensors
    assert read_images.shape == (5, 1, 28, 28)
    assert read_images.dtype == torch.float32
    assert read_labels.dtype == torch.int64
    assert read_labels.tolist() == labels.tolist()
    expected = (images[4, 20, 7] / 255 - MNIST_MEAN) / MNIST_STD
    assert read_images[4, 0, 20, 7].item() == pytest.approx(expected, rel=1e-6)
    assert len(read_mnist(tmp_path, train=False, limit=2)) == 2


def test_mnist_missing_and_mismatched(tmp_path: Path) -> None:
    with pytest.raises(NascompileError, match="has no train-images-idx3-ubyte and no train-images"):
        read_mnist(tmp_path)
    with pytest.raises(
        NascompileError, match="nowhere: not a folder, expected the folder with the MNIST files"
    ):
        read_mnist(tmp_path / "nowhere")
    write_mnist(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(4, np.uint8))
    with pytest.raises(
        NascompileError, match=r"uint8 of shape \(4,\), expected unsigned bytes of shape \(5,\)"
    ):
        read_mnist(tmp_path, train=False)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((5, 28), np.uint8))
    with pytest.raises(NascompileError, match=r"uint8 of shape \(5, 28\), expected .* shape \(N, H, W\)"):
        read_mnist(tmp_path, train=False)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_idx_types_and_byte_order(tmp_path: Path, code: int, dtype: str) -> None:
    array = np.array([[1, 2, 3], [4, 5, 100]], dtype)
    write_idx(tmp_path / "array", array, code)
    assert torch.equal(read_idx(tmp_path / "array"), torch.from_numpy(array))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, expected an IDX header"),
        (b"\x89PNG\r\n", "starts with 89504e47, expected an IDX header"),
        (bytes([0, 0, 0x0A, 1]), "starts with 00000a01, expected an IDX header"),
        (bytes([0, 0, 8, 2, 0, 0, 0, 1]), "8 bytes, expected a header of 12 for 2 dimensions"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3]), r"11 bytes, expected 12 for an array of shape \(4,\)"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), r"10 bytes, expected 9 for an array of shape \(1,\)"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x05", mtime=0)[:-9], "broken gzip file"),
        (b"\x1f\x8bnonsense", "broken gzip file"),
    ],
)
def test_broken_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "array"
    path.write_bytes(content)
    with pytest.raises(NascompileError, match=f"array: {message}"):
        read_idx(path)


def test_limit_below_one(tmp_path: Path) -> None:
    with pytest.raises(NascompileError, match="limit is 0, expected at least 1 image"):
        read_cifar10(tmp_path, limit=0)
