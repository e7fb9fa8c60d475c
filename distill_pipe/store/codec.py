"""Numbers to bytes and back: hidden-state blobs, and the grid that log-probabilities are rounded to.

A blob is one layer of one trace, `[T-1, H]`, little-endian, without a header: shape and codec stand in the sidecar's
schema metadata and the trace's own length. Parquet's zstd is the entropy stage.

| codec        | bytes of bf16 | error                                                                  |
|--------------|---------------|------------------------------------------------------------------------|
| `f32`        | 2.0           | 0                                                                      |
| `bf16`       | 1.0           | 0 for a bf16 engine; 2^-8 relative per element for a float32 or float16 one    |
| `bf16-split` | ~0.7          | as `bf16`: the same bits, exponents and mantissas in planes of their own |

bfloat16 travels as its bits in uint16, because numpy has no such type and the store does not import torch.
"""

import numpy as np
from numpy.typing import NDArray

from distill_pipe.errors import MismatchError
from distill_pipe.store.spec import HiddenCodec

BF16_RELATIVE_ERROR = 2.0**-8


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (to nearest, ties to even) and return the bits. NaN is not preserved: see `Trace`."""
    bits = values.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode_hidden(hidden_TH: NDArray[np.float32] | NDArray[np.uint16], codec: HiddenCodec) -> bytes:
    """One layer of one trace as a blob. `hidden_TH` is float32, or bfloat16 bits as uint16."""
    if codec == "f32":
        return _as_float32(hidden_TH).astype("<f4").tobytes()
    bits_TH = _as_bf16_bits(hidden_TH)
    if codec == "bf16":
        return bits_TH.astype("<u2").tobytes()
    # Sign bit to the bottom: the upper byte is then the whole exponent, which barely varies along a trace.
    turned_TH = (bits_TH << 1) | (bits_TH >> 15)
    return (turned_TH >> 8).astype(np.uint8).tobytes() + (turned_TH & 0xFF).astype(np.uint8).tobytes()


def decode_hidden(blob: bytes, codec: HiddenCodec, hidden_size: int) -> NDArray[np.float32] | NDArray[np.uint16]:
    """The inverse of `encode_hidden`: float32 for `f32`, else bfloat16 bits as uint16; shape `[T-1, H]`.

    Raises:
        MismatchError: the blob's length is not a whole number of rows.
    """
    width = hidden_size * (4 if codec == "f32" else 2)
    if len(blob) % width:
        raise MismatchError(f"a hidden-state blob of {len(blob)} bytes is not a multiple of {width} bytes per token")
    if codec == "f32":
        return np.frombuffer(blob, "<f4").reshape(-1, hidden_size)
    if codec == "bf16":
        return np.frombuffer(blob, "<u2").reshape(-1, hidden_size)
    planes_2N = np.frombuffer(blob, np.uint8).reshape(2, -1).astype(np.uint16)
    turned_N = (planes_2N[0] << 8) | planes_2N[1]
    bits_N: NDArray[np.uint16] = (turned_N >> 1) | (turned_N << 15)
    return bits_N.reshape(-1, hidden_size)


def round_logprobs(logprobs: NDArray[np.float32], grid: float) -> NDArray[np.float32]:
    """Log-probabilities rounded to the nearest multiple of `grid` nats; the error is at most grid / 2. 0 = exact."""
    if grid == 0:
        return logprobs
    steps: NDArray[np.float32] = np.rint(logprobs / np.float32(grid))
    return steps * np.float32(grid)


def _as_float32(hidden_TH: NDArray[np.float32] | NDArray[np.uint16]) -> NDArray[np.float32]:
    if hidden_TH.dtype == np.uint16:
        return bf16_values(hidden_TH.view(np.uint16))
    return hidden_TH.astype(np.float32, copy=False)


def _as_bf16_bits(hidden_TH: NDArray[np.float32] | NDArray[np.uint16]) -> NDArray[np.uint16]:
    if hidden_TH.dtype == np.uint16:
        return hidden_TH.view(np.uint16)
    return bf16_bits(np.ascontiguousarray(hidden_TH, np.float32))
