"""Hidden states to blobs and back, in torch, wherever the tensor is: on the GPU, few bytes then leave the device.

Rows are coded one by one, so a trace may be coded in pieces as the engine delivers them. `q8`, `q6` and `q5` rotate the
row, divide by a step and round. The step is a fixed share of the row's RMS, or 1/127 of its largest rotated element
where that is more, so that no code is ever clipped and each rotated element is off by at most half a step. The rotation
keeps lengths: the error of a row is at most `step / 2 * sqrt(H)`, for any row. The trade-off: an error relative to the
row and not to each channel, so where one channel dwarfs the rest, the rest is coarse; `bf16-split` has no such cost.

Of the store, this file and `rotation` alone import torch. Shapes: N rows, T-1 positions of a trace, M of them that are
measured, H hidden size, P planes, W bytes of a row in one plane.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack
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
from distill_pipe.store.trace import Trace, nonfinite_layer

# Rows are worked on in pieces that stay in a core's cache; on a GPU, in pieces that fill it.
_CPU_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 18, 1 << 24
_MEASURED_STRIDE = 128


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows as a codec leaves them, on the device where they were: P planes of W bytes per row. `scale_N` is the step of
    each row, or its largest element where the codec has no steps; it is not finite where the row is not."""

    codes_NPW: Tensor
    scale_N: Tensor


def code_rows(hidden_NH: Tensor, codec: HiddenCodec) -> CodedRows:
    """Code rows (float32, float16 or bfloat16) on their device, without waiting for it; what is not finite is marked.
    Nothing of a row depends on the others, but for the last bit of a product."""
    rows, width = hidden_NH.shape
    planes = 2 if codec == "bf16-split" else 1
    codes_NPW = torch.empty(rows, planes, width * bytes_per_element(codec) // planes, dtype=torch.uint8,
                            device=hidden_NH.device)
    scale_N = torch.empty(rows, device=hidden_NH.device)
    for part in _chunks(hidden_NH):
        scale_N[part] = _code(hidden_NH[part], codes_NPW[part], codec)
    return CodedRows(codes_NPW, scale_N)


def decode_rows(coded: CodedRows, codec: HiddenCodec, dtype: torch.dtype, out_NH: Tensor | None = None) -> Tensor:
    """The rows again, `[N, H]`, on the same device; in `out_NH` where that is given, which has the dtype then."""
    codes_NPW = coded.codes_NPW
    if out_NH is None:
        shape = len(codes_NPW), codes_NPW.shape[1] * codes_NPW.shape[2] // bytes_per_element(codec)
        out_NH = torch.empty(shape, dtype=dtype, device=codes_NPW.device)
    for rows in _chunks(out_NH):
        if has_scale(codec):
            _dequantise(codes_NPW[rows, 0], coded.scale_N[rows], codec, out_NH[rows])
        elif codec == "bf16-split":
            out_NH[rows] = _joined_planes(codes_NPW[rows])
        else:
            out_NH[rows] = codes_NPW[rows, 0].view(torch.float32 if codec == "f32" else torch.bfloat16)
    return out_NH


def encode_hidden(hidden_NH: Tensor, codec: HiddenCodec) -> HiddenBlob:
    """Encode rows (float32, float16 or bfloat16, any device).

    Raises:
        NotFiniteError: a value is NaN or infinite, or a row's length overflows float32; names the first row and how
            many there are.
    """
    coded = code_rows(hidden_NH.detach(), codec)
    bad_rows = _not_finite(coded)
    if len(bad_rows):
        raise NotFiniteError(f"{len(bad_rows)} positions are not finite, the first is position {bad_rows[0]}")
    return _blob(coded, codec)


def decode_hidden(blob: HiddenBlob, codec: HiddenCodec, hidden_size: int, *, dtype: torch.dtype = torch.bfloat16,
                  device: torch.device | str = "cpu", out_NH: Tensor | None = None) -> Tensor:
    """The rows of a blob, `[N, H]`, in `dtype` on `device`; in `out_NH` where that is given, which has both then.

    Raises:
        DamageError: the blob is not a whole number of rows, or has not one scale per row.
    """
    width = hidden_size * bytes_per_element(codec)
    rows = len(blob.data) // width
    scales = 0 if blob.scale_T is None else len(blob.scale_T)
    if len(blob.data) % width or scales != rows * has_scale(codec):
        raise DamageError(f"a hidden-state blob of {len(blob.data)} bytes and {scales} scales does not hold rows of "
                          f"{width} bytes")
    planes = 2 if codec == "bf16-split" else 1
    codes_PNW = _bytes(blob.data).to(device).view(planes, rows, -1)
    scale_N = torch.empty(0) if blob.scale_T is None else torch.from_numpy(blob.scale_T.copy()).to(device)
    return decode_rows(CodedRows(codes_PNW.transpose(0, 1), scale_N), codec, dtype, out_NH)


def is_measured(positions_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which positions of a trace have the error of their states measured: 0, the powers of two and the multiples of
    128. By position alone, since a row is coded before anybody knows how long its trace will be. A trace of 100
    positions has 8, one of 1,000 has 15, and one in a hundred after that."""
    measured_N: NDArray[np.bool_] = (positions_N & (positions_N - 1) == 0) | (positions_N % _MEASURED_STRIDE == 0)
    return measured_N


def encode_trace(trace: Trace, codec: HiddenCodec) -> EncodedTrace:
    """Encode all hidden states of a trace and let go of the raw ones.

    Raises:
        NotFiniteError: naming the layer.
    """
    hidden = {layer: as_tensor(array_TH) for layer, array_TH in trace.hidden.items()}
    picked_M = torch.from_numpy(np.flatnonzero(is_measured(np.arange(trace.num_tokens - 1))))
    trace.hidden.clear()
    return encoded_trace(trace, {layer: code_rows(hidden_TH, codec) for layer, hidden_TH in hidden.items()},
                         {layer: hidden_TH[picked_M] for layer, hidden_TH in hidden.items()}, codec)


def encoded_trace(trace: Trace, coded: Mapping[int, CodedRows], exact: Mapping[int, Tensor],
                  codec: HiddenCodec) -> EncodedTrace:
    """A trace with its coded states by layer, held against the raw ones of the positions that are measured.

    Raises:
        NotFiniteError: naming the layer.
    """
    picked_M = torch.from_numpy(np.flatnonzero(is_measured(np.arange(trace.num_tokens - 1))))
    errors: dict[int, NDArray[np.float32]] = {}
    for layer, rows in coded.items():
        bad_rows = _not_finite(rows)
        if len(bad_rows):
            raise nonfinite_layer(trace.ordinal, layer, bad_rows)
        stored_MH = decode_rows(CodedRows(rows.codes_NPW[picked_M], rows.scale_N[picked_M]), codec, torch.float32)
        errors[layer] = relative_errors(exact[layer], stored_MH).float().numpy()
    return EncodedTrace(trace, {layer: _blob(rows, codec) for layer, rows in coded.items()}, errors)


def decode_layers(blobs: Mapping[int, HiddenBlob], codec: HiddenCodec, hidden_size: int) -> dict[int, Tensor]:
    """All layers of a stored trace in float32, `[T-1, H]` each."""
    return {layer: decode_hidden(blob, codec, hidden_size, dtype=torch.float32) for layer, blob in blobs.items()}


def require_finite(blobs: Mapping[int, HiddenBlob], codec: HiddenCodec, hidden_size: int) -> None:
    """Decode all layers of a stored trace.

    Raises:
        DamageError: a blob cannot be decoded, or a state is NaN or infinite.
    """
    for layer, hidden_TH in decode_layers(blobs, codec, hidden_size).items():
        if not hidden_TH.isfinite().all():
            raise DamageError(f"a state of layer {layer} is not finite")


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


def _code(rows_NH: Tensor, codes_NPW: Tensor, codec: HiddenCodec) -> Tensor:
    """Code rows into `codes_NPW`; their scales."""
    if has_scale(codec):
        codes_NH, scale_N = _quantise(rows_NH.float(), codec)
        codes_NPW[:, 0] = codes_NH
        return scale_N
    rows_NH = rows_NH.to(torch.float32 if codec == "f32" else torch.bfloat16).contiguous()
    if codec == "bf16-split":
        # The sign goes to the bottom: the upper byte is then the whole exponent, which barely varies along a trace.
        bits_NH = rows_NH.view(torch.int16)
        turned_NH = (bits_NH << 1) | ((bits_NH >> 15) & 1)
        codes_NPW[:, 0], codes_NPW[:, 1] = turned_NH >> 8, turned_NH
    else:
        codes_NPW[:, 0] = rows_NH.view(torch.uint8)
    # The largest of a row is NaN or infinite where any element is, and four times as fast to find.
    return _largest(rows_NH)


def _quantise(rows_NH: Tensor, codec: HiddenCodec) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and the scale of each row."""
    if codec == "fp8":
        scale_N = _round_up(_largest(rows_NH) / FP8_MAX)
        return (rows_NH / scale_N[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scale_N
    rotated_NH = rotate(rows_NH)
    rms_N = torch.linalg.vector_norm(rotated_NH, dim=1) / math.sqrt(rows_NH.shape[1])
    step_N = _round_up(torch.maximum(rms_N * STEP_OF_RMS[codec], _largest(rotated_NH) / LARGEST_CODE))
    return rotated_NH.mul_((1 / step_N)[:, None]).round_().to(torch.int8).view(torch.uint8), step_N


def _dequantise(codes_NH: Tensor, scale_N: Tensor, codec: HiddenCodec, out_NH: Tensor) -> None:
    if codec == "fp8":
        values_NH = codes_NH.view(torch.float8_e4m3fn).float()
    else:
        values_NH = rotate_back(codes_NH.view(torch.int8).to(_product_dtype(codec, out_NH)))
    # Scales have eight significant bits: bfloat16 holds them.
    out_NH.copy_(values_NH.mul_(scale_N[:, None].to(values_NH.dtype)))


def _product_dtype(codec: HiddenCodec, out_NH: Tensor) -> torch.dtype:
    """What rows are rotated back in. Codes are whole numbers that bfloat16 holds; rounding the rotation to it costs
    0.3 % of a row's length, which `q6` and `q5` do not notice, and more than halves the time where the processor has
    instructions for it."""
    if codec == "q8" or out_NH.dtype != torch.bfloat16 or out_NH.device.type != "cpu" or not _has_bfloat16_products():
        return torch.float32
    return torch.bfloat16


@lru_cache(maxsize=1)
def _has_bfloat16_products() -> bool:
    # Older versions of torch cannot tell.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _joined_planes(codes_N2H: Tensor) -> Tensor:
    # Widened and shifted in place: byte by byte into every second byte would be four times slower.
    bits_NH, low_NH = codes_N2H[:, 0].to(torch.int16), codes_N2H[:, 1].to(torch.int16)
    bits_NH <<= 7
    bits_NH |= low_NH >> 1
    low_NH <<= 15
    bits_NH |= low_NH
    return bits_NH.view(torch.bfloat16)


def _largest(rows_NH: Tensor) -> Tensor:
    # Two reductions, because abs().amax() makes a copy and vector_norm(inf) is 20 times slower on a CPU.
    return torch.maximum(rows_NH.amax(1), -rows_NH.amin(1))


def _round_up(scale_N: Tensor) -> Tensor:
    """To 16 bits (8 of them mantissa) and never down: zstd then halves the scales, and no code passes its limit. The
    least scale is the least normal number, whose inverse is finite; a row of zeros has it too."""
    rounded_N = ((scale_N.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(scale_N.isfinite(), rounded_N, scale_N).clamp(min=torch.finfo(torch.float32).tiny)


def _not_finite(coded: CodedRows) -> NDArray[np.int64]:
    bad_rows: NDArray[np.int64] = (~coded.scale_N.isfinite()).nonzero().view(-1).cpu().numpy()
    return bad_rows


def _blob(coded: CodedRows, codec: HiddenCodec) -> HiddenBlob:
    """One plane after the other, little-endian, on the host."""
    # tobytes alone would go over strided elements one by one, 30 times slower.
    codes_PNW = np.ascontiguousarray(coded.codes_NPW.cpu().numpy().transpose(1, 0, 2))
    return HiddenBlob(codes_PNW.tobytes(), coded.scale_N.cpu().numpy() if has_scale(codec) else None)


def _bytes(data: bytes | memoryview) -> Tensor:
    """Bytes as a tensor that shares their memory and must not be written to. Through Arrow, since torch warns of numpy
    arrays that cannot be written to, and a copy of them costs as much as decoding some codecs."""
    array = pa.UInt8Array.from_buffers(pa.uint8(), len(data), [None, pa.py_buffer(data)])
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor


def _chunks(rows_NH: Tensor) -> Iterator[slice]:
    elements = _CPU_CHUNK_ELEMENTS if rows_NH.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    size = max(1, elements // rows_NH.shape[1])
    return (slice(i, i + size) for i in range(0, len(rows_NH), size))
