"""What every reader and writer must know of a codec without running it: sizes, scales, error bounds, forbidden bytes;
and how log-probabilities are rounded.

A blob is one layer of one trace, `[T-1, H]`, without a header: shape and codec stand in the sidecar's schema metadata
and the trace's own length. Parquet's zstd is the entropy stage, so what is stored per element is whole bytes whose
values are cheap to guess. Encoding and decoding are in `hidden_codec`, which needs torch; what is here does not, so
that `verify` runs on a machine that only keeps the data.

| codec        | share of bf16 | relative error of a row | what is stored                                    |
|--------------|---------------|-------------------------|---------------------------------------------------|
| `f32`        | 1.7           | 0                       | float32                                           |
| `bf16`       | 0.78          | 0 for a bf16 engine     | bfloat16                                          |
| `bf16-split` | 0.70          | as `bf16`               | the same bits, exponents and mantissas apart      |
| `fp8`        | 0.41          | 2.6 %                   | float8_e4m3fn with one scale per row              |
| `q8`         | 0.46          | 0.77 %                  | int8 steps of the rotated row, one step per row   |
| `q6`         | 0.33          | 3.1 %                   | the same with a wider step                        |
| `q5`         | 0.27          | 6.4 %                   | the same with a wider step                        |

Shares and errors are of Gaussian rows; the README has those of a real target. Shapes: T tokens, H hidden size.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from distill_pipe.errors import DamageError
from distill_pipe.store.spec import HiddenCodec

BF16_RELATIVE_ERROR: Final = 2.0**-8
FP8_MAX: Final = 448.0
# The least step of a rotated element in units of the row's RMS. A uniform step s of a Gaussian costs s / sqrt(12) of
# relative error and 2.05 - log2(s) bits: 0.0250 gives 0.72 % and 7.4 bits, 0.108 3.1 % and 5.3, 0.22 6.4 % and 4.2.
STEP_OF_RMS: Final[dict[HiddenCodec, float]] = {"q8": 0.025, "q6": 0.108, "q5": 0.222}
LARGEST_CODE: Final = 127
FLOAT32_BITS: Final = 24
SCALED_TAIL_MASS: Final = 0.99


@dataclass(frozen=True, slots=True)
class HiddenBlob:
    """One layer of one trace as stored: bytes, and where the codec needs one a scale per position, `[T-1]`."""

    data: bytes | memoryview
    scale_T: NDArray[np.float32] | None = None


def bytes_per_element(codec: HiddenCodec) -> int:
    """Bytes of one element of a hidden state in a blob, before zstd."""
    return {"f32": 4, "bf16": 2, "bf16-split": 2}.get(codec, 1)


def has_scale(codec: HiddenCodec) -> bool:
    """Whether a blob of this codec comes with a scale per position."""
    return codec == "fp8" or codec in STEP_OF_RMS


def check_blob(blob: HiddenBlob, codec: HiddenCodec, shape: tuple[int, int]) -> None:
    """Hold a blob against its shape `(T-1, H)` and look for values that are not finite, without decoding it.

    Raises:
        DamageError: a length is wrong, or a value is NaN or infinite.
    """
    positions, hidden_size = shape
    expected = positions * hidden_size * bytes_per_element(codec)
    if len(blob.data) != expected:
        raise DamageError(f"a blob has {len(blob.data)} bytes, expected {expected}")
    scales = 0 if blob.scale_T is None else len(blob.scale_T)
    if scales != positions * has_scale(codec):
        raise DamageError(f"a blob has {scales} scales, expected {positions * has_scale(codec)}")
    if blob.scale_T is not None and not (np.isfinite(blob.scale_T) & (blob.scale_T >= 0)).all():
        raise DamageError("a scale is negative or not finite")
    bad = int(np.count_nonzero(_nonfinite(np.frombuffer(blob.data, np.uint8), codec)))
    if bad:
        raise DamageError(f"{bad} elements are not finite")


def _nonfinite(data: NDArray[np.uint8], codec: HiddenCodec) -> NDArray[np.bool_]:
    """Per element of a blob: is it NaN or infinite?"""
    bad: NDArray[np.bool_]
    if codec == "f32":
        bad = ~np.isfinite(data.view("<f4"))
    elif codec == "bf16":
        bad = (data.view("<u2") & 0x7F80) == 0x7F80
    elif codec == "bf16-split":
        bad = data[:len(data) // 2] == 0xFF
    elif codec == "fp8":
        bad = (data & 0x7F) == 0x7F
    else:
        bad = data.view(np.int8) == -LARGEST_CODE - 1
    return bad


def round_significant(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Normal float32 numbers to the nearest of `bits` significant bits, ties to even; 24 bits change nothing.

    The relative error is at most 2^-bits. A log-probability x is then off by 2^-bits |x|, and the probability by about
    p |x| 2^-bits: the error follows the entropy of the row, where a uniform grid spends bits on unlikely tokens.
    """
    drop = FLOAT32_BITS - bits
    if drop == 0:
        return values
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1) + ((raw >> np.uint32(drop)) & np.uint32(1))
    rounded: NDArray[np.float32] = ((raw + half) >> np.uint32(drop) << np.uint32(drop)).view(np.float32)
    return rounded


def rounding_error(bits: int) -> float:
    """The most that `round_significant` moves a number, as a share of what it becomes."""
    return 0.0 if bits >= FLOAT32_BITS else 2.0**-bits


def scalar_bits(logprob_bits: int) -> int:
    """Significant bits of `logsumexp`, `tail_mass` and `next_logprob`: one number per row, so eight more."""
    return min(FLOAT32_BITS, logprob_bits + 8)


def head_shift(topk_logprobs_N: NDArray[Any], topk_counts_R: NDArray[Any], tail_mass_R: NDArray[Any]
               ) -> NDArray[np.float64]:
    """What to add to the head log-probabilities of each row, so that head and tail mass add up to 1: what rounding took
    from the row as a whole is given back, and a third of its total variation with it. 0 for a row that is nearly all
    tail, since 1 - tail_mass is no better known there than the head."""
    logprobs_N, tail_R = topk_logprobs_N.astype(np.float64), tail_mass_R.astype(np.float64)
    rows_N = np.repeat(np.arange(len(topk_counts_R)), topk_counts_R)
    head_R = np.bincount(rows_N, np.exp(logprobs_N), len(topk_counts_R))
    usable_R = (tail_R <= SCALED_TAIL_MASS) & (head_R > 0)
    shift_R: NDArray[np.float64] = (np.log(np.where(usable_R, 1.0 - tail_R, 1.0))
                                    - np.log(np.where(usable_R, head_R, 1.0)))
    return shift_R


def scaled_head(topk_logprobs_N: NDArray[Any], topk_counts_R: NDArray[Any], tail_mass_R: NDArray[Any]
                ) -> NDArray[np.float64]:
    """Head log-probabilities shifted by `head_shift`."""
    scaled_N: NDArray[np.float64] = topk_logprobs_N.astype(np.float64) + np.repeat(
        head_shift(topk_logprobs_N, topk_counts_R, tail_mass_R), topk_counts_R)
    return scaled_N
