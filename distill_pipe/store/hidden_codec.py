"""Hidden states to blobs and back, in torch, wherever the tensor is: on the GPU, few bytes then leave the device.

Rows are coded one by one, so a trace may be coded in pieces as the engine delivers them. `q8`, `q6` and `q5` rotate the
row, divide by a step and round. The step is a fixed share of the row's RMS, or 1/127 of its largest rotated element
where that is more, so that no code is ever clipped and each rotated element is off by at most half a step. The rotation
keeps lengths: the error of a row is at most `step / 2 * sqrt(H)`, for any row. The trade-off: an error relative to the
row and not to each channel, so where one channel dwarfs the rest, the rest is coarse; `bf16-split` has no such cost.

Of the store, this file and `rotation` alone import torch. Shapes: N rows, T-1 positions of a trace, H hidden size.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import DamageError, NotFiniteError
from distill_pipe.store.codec import (
    FP8_MAX,
    LARGEST_CODE,
    STEP_OF_RMS,
    HiddenBlob,
    bytes_per_element,
    has_scale,
)
from distill_pipe.store.rotation import rotate, rotate_back
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.trace import Trace

# Rows are worked on in pieces that stay in a core's cache; on a GPU, in pieces that fill it.
_CPU_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 18, 1 << 26
_MEASURED_ROWS = 8


def encode_hidden(hidden_NH: Tensor, codec: HiddenCodec) -> HiddenBlob:
    """Encode rows (float32, float16 or bfloat16, any device).

    Raises:
        NotFiniteError: a value is NaN or infinite, or a row's length overflows float32; names the first row and how
            many there are.
    """
    hidden_NH = hidden_NH.detach()
    if has_scale(codec):
        codes_NH = torch.empty(hidden_NH.shape, dtype=torch.uint8, device=hidden_NH.device)
        scale_N = torch.empty(len(hidden_NH), device=hidden_NH.device)
        for rows in _chunks(hidden_NH):
            codes_NH[rows], scale_N[rows] = _quantise(hidden_NH[rows].float(), codec)
        _require_finite(scale_N.isfinite())
        return HiddenBlob(_bytes(codes_NH), scale_N.cpu().numpy())
    hidden_NH = hidden_NH.to(torch.float32 if codec == "f32" else torch.bfloat16)
    # The largest of a row is NaN or infinite where any element is, and four times as fast to find.
    _require_finite(_largest(hidden_NH).isfinite())
    return HiddenBlob(_bytes(_split(hidden_NH) if codec == "bf16-split" else hidden_NH))


def decode_hidden(blob: HiddenBlob, codec: HiddenCodec, hidden_size: int, *, dtype: torch.dtype = torch.bfloat16,
                  device: torch.device | str = "cpu") -> Tensor:
    """The rows of a blob, `[N, H]`, in `dtype` on `device`.

    Raises:
        DamageError: the blob is not a whole number of rows, or has not one scale per row.
    """
    width = hidden_size * bytes_per_element(codec)
    rows = len(blob.data) // width
    scales = 0 if blob.scale_T is None else len(blob.scale_T)
    if len(blob.data) % width or scales != rows * has_scale(codec):
        raise DamageError(f"a hidden-state blob of {len(blob.data)} bytes and {scales} scales does not hold rows of "
                          f"{width} bytes")
    raw = torch.from_numpy(np.frombuffer(blob.data, np.uint8).copy()).to(device)
    if blob.scale_T is not None:
        return _dequantise(raw.view(rows, hidden_size), torch.from_numpy(blob.scale_T.copy()).to(device), codec, dtype)
    if codec == "f32":
        return raw.view(torch.float32).view(rows, hidden_size).to(dtype)
    if codec == "bf16-split":
        high_low_2N = raw.view(2, -1)
        turned_N = torch.stack((high_low_2N[1], high_low_2N[0]), dim=1).view(torch.int16).view(-1)
        raw = (((turned_N >> 1) & 0x7FFF) | (turned_N << 15)).view(torch.uint8)
    return raw.view(torch.bfloat16).view(rows, hidden_size).to(dtype)


def encode_trace(trace: Trace, codec: HiddenCodec) -> EncodedTrace:
    """Encode all hidden states of a trace, measure the error of some rows, and let go of the raw states.

    Raises:
        NotFiniteError: naming the layer.
    """
    blobs: dict[int, HiddenBlob] = {}
    errors: dict[int, NDArray[np.float32]] = {}
    for layer, array_TH in trace.hidden.items():
        hidden_TH = as_tensor(array_TH)
        try:
            blobs[layer] = encode_hidden(hidden_TH, codec)
        except NotFiniteError as error:
            raise NotFiniteError(f"prompt {trace.ordinal}: layer {layer}: {error}") from None
        errors[layer] = _measured_errors(hidden_TH, codec)
    trace.hidden.clear()
    return EncodedTrace(trace, blobs, errors)


def decode_layers(blobs: Mapping[int, HiddenBlob], codec: HiddenCodec, hidden_size: int) -> dict[int, Tensor]:
    """All layers of a stored trace in float32, `[T-1, H]` each."""
    return {layer: decode_hidden(blob, codec, hidden_size, dtype=torch.float32) for layer, blob in blobs.items()}


def as_tensor(hidden_TH: NDArray[np.float32] | NDArray[np.uint16]) -> Tensor:
    """A trace's raw states as a tensor: float32, or bfloat16 where they are bits."""
    if hidden_TH.dtype == np.uint16:
        return torch.from_numpy(hidden_TH.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(hidden_TH)


def relative_errors(exact_NH: Tensor, decoded_NH: Tensor) -> Tensor:
    """Length of the error over length of the row, `[N]`; 0 for a row of zeros that was kept."""
    exact_NH, decoded_NH = exact_NH.double(), decoded_NH.double()
    error_N, length_N = (decoded_NH - exact_NH).norm(dim=1), exact_NH.norm(dim=1)
    return torch.where(error_N == 0, 0.0, error_N / length_N)


def _split(rows_NH: Tensor) -> Tensor:
    """Two planes of bytes. The sign goes to the bottom: the upper byte is then the whole exponent, which barely varies
    along a trace."""
    bits_NH = rows_NH.view(torch.int16)
    turned_NH = (bits_NH << 1) | ((bits_NH >> 15) & 1)
    planes_2NH = torch.empty(2, *rows_NH.shape, dtype=torch.uint8, device=rows_NH.device)
    planes_2NH[0], planes_2NH[1] = turned_NH >> 8, turned_NH
    return planes_2NH


def _quantise(rows_NH: Tensor, codec: HiddenCodec) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and the scale of each row."""
    if codec == "fp8":
        scale_N = _round_up(_largest(rows_NH) / FP8_MAX)
        return (rows_NH / scale_N[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scale_N
    rotated_NH = rotate(rows_NH)
    rms_N = torch.linalg.vector_norm(rotated_NH, dim=1) / math.sqrt(rows_NH.shape[1])
    step_N = _round_up(torch.maximum(rms_N * STEP_OF_RMS[codec], _largest(rotated_NH) / LARGEST_CODE))
    return rotated_NH.mul_((1 / step_N)[:, None]).round_().to(torch.int8).view(torch.uint8), step_N


def _dequantise(codes_NH: Tensor, scale_N: Tensor, codec: HiddenCodec, dtype: torch.dtype) -> Tensor:
    out_NH = torch.empty(codes_NH.shape, dtype=dtype, device=codes_NH.device)
    kind = torch.float8_e4m3fn if codec == "fp8" else torch.int8
    for rows in _chunks(codes_NH):
        values_NH = codes_NH[rows].view(kind).float()
        if codec != "fp8":
            values_NH = rotate_back(values_NH)
        out_NH[rows] = values_NH.mul_(scale_N[rows, None])
    return out_NH


def _largest(rows_NH: Tensor) -> Tensor:
    # Two reductions, because abs().amax() makes a copy and vector_norm(inf) is 20 times slower on a CPU.
    return torch.maximum(rows_NH.amax(1), -rows_NH.amin(1))


def _round_up(scale_N: Tensor) -> Tensor:
    """To 16 bits (8 of them mantissa) and never down: zstd then halves the scales, and no code passes its limit. The
    least scale is the least normal number, whose inverse is finite; a row of zeros has it too."""
    rounded_N = ((scale_N.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(scale_N.isfinite(), rounded_N, scale_N).clamp(min=torch.finfo(torch.float32).tiny)


def _measured_errors(hidden_TH: Tensor, codec: HiddenCodec) -> NDArray[np.float32]:
    """Relative errors of a few evenly spaced rows; the first is one of them, since its activations are the largest."""
    picked_NH = hidden_TH[torch.linspace(0, len(hidden_TH) - 1, min(_MEASURED_ROWS, len(hidden_TH))).long()]
    # Rows are coded one by one, so those few again are what the blob holds of them.
    decoded_NH = decode_hidden(encode_hidden(picked_NH, codec), codec, hidden_TH.shape[1], dtype=torch.float32)
    errors: NDArray[np.float32] = relative_errors(picked_NH, decoded_NH).float().numpy()
    return errors


def _require_finite(finite_N: Tensor) -> None:
    bad = (~finite_N).nonzero().view(-1)
    if len(bad):
        raise NotFiniteError(f"{len(bad)} positions are not finite, the first is position {int(bad[0])}")


def _chunks(rows_NH: Tensor) -> Iterator[slice]:
    elements = _CPU_CHUNK_ELEMENTS if rows_NH.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    size = max(1, elements // rows_NH.shape[1])
    return (slice(i, i + size) for i in range(0, len(rows_NH), size))


def _bytes(tensor: Tensor) -> bytes:
    """The tensor's bytes, little-endian, on the host."""
    return tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
