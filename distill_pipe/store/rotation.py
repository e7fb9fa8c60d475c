"""An orthogonal rotation that spreads a row's energy over all of its elements, for any width, and its inverse.

Hidden states have a few channels hundreds of times larger than the rest. A uniform step wide enough for those leaves
nothing of the others; after a rotation every element is about as large as the row's RMS and one step fits all. The
rotation is `(C_a S_a) ⊗ (C_b S_b)` with H = a * b as square as H allows, C a discrete Hartley matrix (symmetric and its
own inverse) and S random signs. Two small products cost 2 (a + b) operations per element instead of 2 H; the trade-off
is a dense product for a prime width, which no model has.

Shapes: N rows, H width = a * b.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distill_pipe.store.splitmix import mix


def factors(width: int) -> tuple[int, int]:
    """The divisors (a, b) of `width` with a <= b that lie closest to each other."""
    a = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
    return a, width // a


def hartley_signed(size: int) -> Tensor:
    """`C S`, float64 `[size, size]`: element (i, j) is `s_j (cos x + sin x) / sqrt(size)`, `x = 2 pi i j / size`.

    The sign s_j is -1 where the lowest bit of `mix(size * 2^32 + j)` is set; `mix` is splitmix64.
    """
    index = torch.arange(size, dtype=torch.int64)
    # The product is reduced before it is scaled, so that large indices lose no precision.
    angle = (index[:, None] * index % size).double() * (2 * math.pi / size)
    hashes = mix((size << 32) + np.arange(size, dtype=np.uint64))
    signs = torch.from_numpy(1.0 - 2.0 * (hashes & np.uint64(1)).astype(np.float64))
    return (angle.cos() + angle.sin()) * signs / math.sqrt(size)


def rotate(rows_NH: Tensor) -> Tensor:
    """Rotate float32 rows; lengths are kept."""
    a, b = factors(rows_NH.shape[1])
    left_aa, right_bb = _matrices(a, b, rows_NH.dtype, rows_NH.device)
    mixed = torch.matmul(rows_NH.reshape(-1, b), right_bb.T).view(-1, a, b)
    return (torch.matmul(left_aa, mixed) if a > 1 else mixed).view(-1, a * b)


def rotate_back(rows_NH: Tensor) -> Tensor:
    """The inverse of `rotate`; bfloat16 rows are rotated in bfloat16, which rounds the matrices too."""
    a, b = factors(rows_NH.shape[1])
    left_aa, right_bb = _matrices(a, b, rows_NH.dtype, rows_NH.device)
    mixed = rows_NH.view(-1, a, b)
    mixed = torch.matmul(left_aa.T, mixed) if a > 1 else mixed
    return torch.matmul(mixed.reshape(-1, b), right_bb).view(-1, a * b)


@lru_cache(maxsize=8)
def _matrices(a: int, b: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return hartley_signed(a).to(device, dtype), hartley_signed(b).to(device, dtype)
