"""Catches a codec that loses bits, rounds another way than torch, or gives back another shape than it was given.

Shapes: T-1 rows of H values per blob, N values.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from distill_pipe.errors import MismatchError
from distill_pipe.store.codec import (
    BF16_RELATIVE_ERROR,
    bf16_bits,
    bf16_values,
    decode_hidden,
    encode_hidden,
    round_logprobs,
)
from distill_pipe.store.spec import HiddenCodec

CODECS: tuple[HiddenCodec, ...] = ("bf16", "bf16-split", "f32")
ALL_BITS = np.arange(2**16, dtype=np.uint16)
FINITE_BITS = ALL_BITS[(ALL_BITS & 0x7F80) != 0x7F80]
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST_BF16 = float(bf16_values(np.array([0x7F7F], np.uint16))[0])

shapes_TH = array_shapes(min_dims=2, max_dims=2, max_side=40)
float32s = arrays(np.float32, shapes_TH, elements=st.floats(-LARGEST_BF16, LARGEST_BF16, width=32))


@pytest.mark.parametrize("codec", ["bf16", "bf16-split"])
@pytest.mark.parametrize("hidden_size", [1, 2, 256])
def test_every_bfloat16_value_survives_with_its_exact_bits(codec: HiddenCodec, hidden_size: int) -> None:
    bits_TH = ALL_BITS.reshape(-1, hidden_size)
    back_TH = decode_hidden(encode_hidden(bits_TH, codec), codec, hidden_size)
    assert back_TH.dtype == np.uint16
    assert np.array_equal(back_TH, bits_TH)


@given(arrays(np.uint16, shapes_TH), st.sampled_from(["bf16", "bf16-split"]))
def test_bfloat16_blobs_round_trip_in_every_shape(bits_TH: NDArray[np.uint16], codec: HiddenCodec) -> None:
    blob = encode_hidden(bits_TH, codec)
    assert len(blob) == 2 * bits_TH.size
    assert np.array_equal(decode_hidden(blob, codec, bits_TH.shape[1]), bits_TH)


@given(float32s)
def test_float32_blobs_keep_every_bit(hidden_TH: NDArray[np.float32]) -> None:
    back_TH = decode_hidden(encode_hidden(hidden_TH, "f32"), "f32", hidden_TH.shape[1])
    assert back_TH.dtype == np.float32
    assert np.array_equal(back_TH.view(np.uint32), hidden_TH.view(np.uint32))


def test_negative_zero_and_denormals_keep_their_bits_in_every_codec() -> None:
    bits_TH = np.array([[0x8000, 0x0000], [0x0001, 0x8001], [0x007F, 0x0080]], np.uint16)
    for codec in CODECS:
        back_TH = decode_hidden(encode_hidden(bits_TH, codec), codec, 2)
        back_bits_TH = back_TH if codec != "f32" else bf16_bits(back_TH.astype(np.float32))
        assert np.array_equal(back_bits_TH, bits_TH), codec


@given(float32s, st.sampled_from(["bf16", "bf16-split"]))
def test_the_error_of_float32_input_stays_within_the_stated_bound(hidden_TH: NDArray[np.float32],
                                                                  codec: HiddenCodec) -> None:
    back_TH = bf16_values(decode_hidden(encode_hidden(hidden_TH, codec), codec, hidden_TH.shape[1]).view(np.uint16))
    exact_TH = hidden_TH.astype(np.float64)
    bound_TH = BF16_RELATIVE_ERROR * np.maximum(np.abs(exact_TH), SMALLEST_NORMAL)
    assert (np.abs(back_TH.astype(np.float64) - exact_TH) <= bound_TH).all()


def test_the_stated_bound_is_reached_so_it_is_not_a_loose_one() -> None:
    halfway = np.array([[1 + 2.0**-8]], np.float32)
    back = bf16_values(bf16_bits(halfway))
    assert abs(back - halfway)[0, 0] > 0.99 * BF16_RELATIVE_ERROR


@given(arrays(np.float32, st.integers(1, 64), elements=st.floats(allow_nan=False, width=32)))
def test_rounding_to_bfloat16_agrees_with_torch_on_any_float32(values_N: NDArray[np.float32]) -> None:
    by_torch_N = torch.from_numpy(values_N).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bf16_bits(values_N), by_torch_N)


def test_rounding_to_bfloat16_agrees_with_torch_on_every_tie_and_its_neighbours() -> None:
    upper_N = FINITE_BITS.astype(np.uint32) << 16
    for lower in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values_N = (upper_N | lower).view(np.float32)
        by_torch_N = torch.from_numpy(values_N).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(bf16_bits(values_N), by_torch_N), hex(lower)


def test_the_values_of_bfloat16_bits_are_those_torch_gives_them() -> None:
    by_torch_N = torch.from_numpy(FINITE_BITS.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(bf16_values(FINITE_BITS).view(np.uint32), by_torch_N.view(np.uint32))


def test_columns_in_another_memory_order_are_stored_in_the_same_order() -> None:
    hidden_TH = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for codec in CODECS:
        assert encode_hidden(np.asfortranarray(hidden_TH), codec) == encode_hidden(hidden_TH, codec)
        assert encode_hidden(np.repeat(hidden_TH, 2, axis=0)[::2], codec) == encode_hidden(hidden_TH, codec)


def test_blobs_are_little_endian_and_the_split_keeps_exponents_apart() -> None:
    bits_TH = np.array([[0x3F81, 0xBF82]], np.uint16)
    assert encode_hidden(bits_TH, "bf16") == b"\x81\x3f\x82\xbf"
    assert encode_hidden(bits_TH, "bf16-split") == b"\x7f\x7f" + b"\x02\x05"
    assert encode_hidden(np.array([[1.0]], np.float32), "f32") == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("codec", CODECS)
def test_a_blob_that_is_no_whole_number_of_rows_is_refused(codec: HiddenCodec) -> None:
    blob = encode_hidden(np.zeros((3, 4), np.float32), codec)
    for wrong in (blob[:-1], blob + b"\0", blob[:-len(blob) // 6]):
        with pytest.raises(MismatchError, match="not a multiple of"):
            decode_hidden(wrong, codec, 4)


@given(arrays(np.float32, st.integers(1, 64), elements=st.floats(-60, 0, width=32)),
       st.sampled_from([1 / 32, 1 / 8, 1 / 1024, 0.1, 1.0]))
def test_rounded_logprobs_lie_on_the_grid_within_half_a_step_and_in_order(logprobs_N: NDArray[np.float32],
                                                                           grid: float) -> None:
    rounded_N = round_logprobs(logprobs_N, grid)
    assert rounded_N.dtype == np.float32
    # A grid that is no power of two adds float32 rounding, of the quotient and of the product.
    slack_N = 0 if np.log2(grid).is_integer() else 2 * np.finfo(np.float32).eps * np.abs(logprobs_N)
    error_N = np.abs(rounded_N.astype(np.float64) - logprobs_N)
    assert (error_N <= grid / 2 + slack_N).all()
    order = np.argsort(logprobs_N)
    assert (np.diff(rounded_N[order]) >= 0).all()
    assert np.array_equal(round_logprobs(rounded_N, grid), rounded_N)
    assert (rounded_N <= 0).all()


def test_a_grid_of_zero_keeps_float32() -> None:
    logprobs_N = np.array([-0.1, -1.2345678, -30], np.float32)
    assert np.array_equal(round_logprobs(logprobs_N, 0.0), logprobs_N)
