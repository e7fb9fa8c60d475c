"""Catches a codec that loses bits, breaks its error bound, changes what it is given, or lets NaN and Inf through.

Shapes: N rows of H values per blob.
"""

import hashlib
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import DamageError, NotFiniteError
from distill_pipe.store import hidden_codec
from distill_pipe.store.codec import (
    BF16_RELATIVE_ERROR,
    STEP_OF_RMS,
    HiddenBlob,
    bytes_per_element,
    check_blob,
    has_scale,
    round_significant,
)
from distill_pipe.store.hidden_codec import code_rows, decode_hidden, encode_hidden, is_measured, relative_errors
from distill_pipe.store.rotation import factors, hartley_signed, rotate, rotate_back
from distill_pipe.store.spec import HiddenCodec

CODECS: tuple[HiddenCodec, ...] = get_args(HiddenCodec)
STEPPED: tuple[HiddenCodec, ...] = ("q8", "q6", "q5")
ALL_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
FINITE = ALL_BITS[(ALL_BITS & 0x7F80) != 0x7F80].view(torch.bfloat16)
LARGEST_BF16 = torch.finfo(torch.bfloat16).max
WIDTHS = (576, 2880, 4096, 7168)

shapes_NH = array_shapes(min_dims=2, max_dims=2, max_side=40)
float32s = arrays(np.float32, shapes_NH, elements=st.floats(-LARGEST_BF16, LARGEST_BF16, width=32))
# Squares of these stay within float32.
moderate = arrays(np.float32, shapes_NH, elements=st.floats(-2.0**50, 2.0**50, width=32))


def round_trip(hidden_NH: Tensor, codec: HiddenCodec) -> Tensor:
    """Decoded to float32."""
    return decode_hidden(encode_hidden(hidden_NH, codec), codec, hidden_NH.shape[1], dtype=torch.float32)


def gaussian(width: int, rows: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", ["bf16", "bf16-split"])
@pytest.mark.parametrize("hidden_size", [1, 2, 256])
def test_every_finite_bfloat16_value_survives_with_its_exact_bits(codec: HiddenCodec, hidden_size: int) -> None:
    rows_NH = FINITE.view(-1, hidden_size)
    back_NH = decode_hidden(encode_hidden(rows_NH, codec), codec, hidden_size)
    assert back_NH.dtype == torch.bfloat16
    assert torch.equal(back_NH.view(torch.int16), rows_NH.view(torch.int16))


@given(float32s)
def test_float32_blobs_keep_every_bit(hidden_NH: NDArray[np.float32]) -> None:
    back_NH = round_trip(torch.from_numpy(hidden_NH), "f32")
    assert np.array_equal(back_NH.numpy().view(np.uint32), hidden_NH.view(np.uint32))


@given(float32s, st.sampled_from(["bf16", "bf16-split"]))
def test_float32_states_are_rounded_to_the_nearest_bfloat16(hidden_NH: NDArray[np.float32], codec: HiddenCodec) -> None:
    exact_NH = torch.from_numpy(hidden_NH)
    back_NH = round_trip(exact_NH, codec)
    assert torch.equal(back_NH, exact_NH.bfloat16().float())
    normal_NH = exact_NH.abs() >= torch.finfo(torch.float32).tiny
    assert ((back_NH - exact_NH).abs() <= exact_NH.abs() * BF16_RELATIVE_ERROR)[normal_NH].all()


@given(st.one_of(float32s, moderate), st.sampled_from(CODECS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape_comes_back_and_the_states_given_are_left_alone(hidden_NH: NDArray[np.float32], codec: HiddenCodec,
                                                                  dtype: torch.dtype) -> None:
    exact_NH = torch.from_numpy(hidden_NH).to(dtype)
    kept_NH = exact_NH.clone()
    try:
        blob = encode_hidden(exact_NH, codec)
    except NotFiniteError:
        assert has_scale(codec)
        assert np.abs(hidden_NH).max() > 1e17
        return
    assert torch.equal(exact_NH, kept_NH)
    assert len(blob.data) == exact_NH.numel() * bytes_per_element(codec)
    assert (blob.scale_T is not None) == has_scale(codec)
    check_blob(blob, codec, (exact_NH.shape[0], exact_NH.shape[1]))
    assert decode_hidden(blob, codec, exact_NH.shape[1]).shape == exact_NH.shape


@given(moderate, st.sampled_from(STEPPED))
def test_a_row_is_off_by_at_most_half_a_step_in_every_rotated_element(hidden_NH: NDArray[np.float32],
                                                                      codec: HiddenCodec) -> None:
    exact_NH = torch.from_numpy(hidden_NH)
    blob = encode_hidden(exact_NH, codec)
    assert blob.scale_T is not None
    decoded_NH = decode_hidden(blob, codec, exact_NH.shape[1], dtype=torch.float32)
    error_N = (decoded_NH.double() - exact_NH.double()).norm(dim=1)
    bound_N = torch.from_numpy(blob.scale_T).double() / 2 * math.sqrt(exact_NH.shape[1])
    # float32 products add rounding of their own, in proportion to the row.
    assert (error_N <= bound_N + 1e-5 * exact_NH.double().norm(dim=1)).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("codec", "typical"), [("q8", 0.010), ("q6", 0.0325), ("q5", 0.066), ("fp8", 0.027)])
def test_the_error_on_gaussian_rows_is_what_the_codec_says(codec: HiddenCodec, typical: float, width: int) -> None:
    exact_NH = gaussian(width)
    errors_N = relative_errors(exact_NH, round_trip(exact_NH, codec))
    assert errors_N.mean() < typical
    assert errors_N.max() < 1.5 * typical


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("codec", STEPPED)
def test_a_channel_a_thousand_times_larger_than_the_rest_costs_no_accuracy_of_the_row(codec: HiddenCodec,
                                                                                      width: int) -> None:
    exact_NH = gaussian(width)
    exact_NH[:, width // 3] *= 1000
    errors_N = relative_errors(exact_NH, round_trip(exact_NH, codec))
    assert errors_N.max() < 1.3 * STEP_OF_RMS[codec] / math.sqrt(12)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_zeros_stay_zeros_beside_other_rows(codec: HiddenCodec) -> None:
    exact_NH = gaussian(48, rows=3)
    exact_NH[1] = 0
    back_NH = round_trip(exact_NH, codec)
    assert (back_NH[1] == 0).all()
    assert relative_errors(exact_NH, back_NH)[[0, 2]].max() < 0.08


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_refused_with_position_and_count(codec: HiddenCodec, bad: float) -> None:
    exact_NH = gaussian(48, rows=9)
    exact_NH[3, 7] = exact_NH[5, 0] = bad
    with pytest.raises(NotFiniteError, match="2 positions are not finite, the first is position 3"):
        encode_hidden(exact_NH, codec)


def test_not_a_number_with_every_bit_set_is_refused_too() -> None:
    exact_NH = gaussian(8, rows=2)
    exact_NH.view(torch.int32)[1, 2] = 0x7FFFFFFF
    for codec in CODECS:
        with pytest.raises(NotFiniteError):
            encode_hidden(exact_NH, codec)


@pytest.mark.parametrize("codec", ["bf16", "bf16-split"])
def test_a_float32_that_would_round_to_an_infinite_bfloat16_is_refused(codec: HiddenCodec) -> None:
    with pytest.raises(NotFiniteError, match="1 positions are not finite, the first is position 1"):
        encode_hidden(torch.tensor([[1.0, 2.0], [1.0, 3.4e38]]), codec)


# SHA-256 of bytes and scales, of 5 rows of 7 bfloat16 and 3 rows of 97 float16.
DIGESTS: dict[HiddenCodec, tuple[str, str]] = {
    "f32": ("7a65d462b8b859ae", "87b73c031eda2bbe"), "bf16": ("eccb94cebb68b142", "4cf2b5727d81547e"),
    "bf16-split": ("bf779ec48df12a7f", "bbd1a9364eef0942"), "fp8": ("9c012a294df6dbfa", "ef388cc122c1ad78"),
}


# Rotations are matrix products, which another processor may sum in another order.
@pytest.mark.parametrize("codec", DIGESTS)
@pytest.mark.parametrize(("i", "rows", "width", "dtype"), [(0, 5, 7, torch.bfloat16), (1, 3, 97, torch.float16)])
def test_blobs_are_those_that_were_always_written(codec: HiddenCodec, i: int, rows: int, width: int,
                                                  dtype: torch.dtype) -> None:
    # numpy's numbers: torch draws others on another processor.
    exact_NH = torch.from_numpy(np.random.default_rng(width).standard_normal((rows, width), np.float32))
    exact_NH[:, width // 3] *= 300
    exact_NH[1] = 0
    blob = encode_hidden(exact_NH.to(dtype), codec)
    scales = b"" if blob.scale_T is None else blob.scale_T.tobytes()
    assert hashlib.sha256(bytes(blob.data) + scales).hexdigest().startswith(DIGESTS[codec][i])


@pytest.mark.parametrize("codec", CODECS)
def test_rows_that_are_not_finite_are_marked_and_the_others_coded_as_without_them(codec: HiddenCodec) -> None:
    exact_NH = gaussian(49, rows=9)
    bad_NH = exact_NH.clone()
    bad_NH[3, 7], bad_NH[5, 0] = math.nan, -math.inf
    good, coded = code_rows(exact_NH, codec), code_rows(bad_NH, codec)
    assert coded.scale_N.isfinite().tolist() == [n not in (3, 5) for n in range(9)]
    kept = [n for n in range(9) if n not in (3, 5)]
    assert torch.equal(coded.codes_NPW[kept], good.codes_NPW[kept])
    assert torch.equal(coded.scale_N[kept], good.scale_N[kept])


def test_measured_positions_are_the_first_the_powers_of_two_and_every_128th() -> None:
    assert np.flatnonzero(is_measured(np.arange(600))).tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width", [576, 4096])
@pytest.mark.parametrize("codec", STEPPED)
def test_decoding_to_bfloat16_costs_next_to_nothing_on_any_processor(codec: HiddenCodec, width: int, native: bool,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_codec, "_has_bfloat16_products", lambda: native)
    exact_NH = gaussian(width, rows=64)
    blob = encode_hidden(exact_NH, codec)
    exactly, quickly = (relative_errors(exact_NH, decode_hidden(blob, codec, width, dtype=dtype))
                        for dtype in (torch.float32, torch.bfloat16))
    # The rounding of what comes out is 0.17 % of a row by itself.
    assert quickly.mean() <= 1.04 * exactly.mean()
    assert (quickly <= exactly + 2e-3).all()


@pytest.mark.parametrize("codec", CODECS)
def test_rows_may_be_encoded_in_pieces(codec: HiddenCodec) -> None:
    exact_NH = gaussian(576, rows=700)
    whole, parts = encode_hidden(exact_NH, codec), [encode_hidden(part, codec) for part in exact_NH.split(97)]
    decoded_NH = torch.cat([decode_hidden(p, codec, 576, dtype=torch.float32) for p in parts])
    # A product of other shapes may round another way: a code then moves by one step.
    assert relative_errors(decode_hidden(whole, codec, 576, dtype=torch.float32), decoded_NH).max() < 2e-2


@pytest.mark.parametrize("width", [1, 2, 7, 12, 97, *WIDTHS])
def test_the_rotation_is_orthogonal_for_any_width(width: int) -> None:
    a, b = factors(width)
    assert a * b == width
    assert a <= b
    for size in (a, b):
        matrix = hartley_signed(size)
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    rows_NH = gaussian(width, rows=5)
    turned_NH = rotate(rows_NH)
    assert torch.allclose(turned_NH.norm(dim=1), rows_NH.norm(dim=1), rtol=1e-5)
    assert torch.allclose(rotate_back(turned_NH), rows_NH, atol=1e-4)


@pytest.mark.parametrize("width", [6, 24, 60])
def test_the_rotation_is_the_kronecker_product_of_its_two_matrices(width: int) -> None:
    a, b = factors(width)
    dense_HH = torch.kron(hartley_signed(a), hartley_signed(b))
    rows_NH = gaussian(width, rows=5)
    assert torch.allclose(rotate(rows_NH).double(), rows_NH.double() @ dense_HH.T, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_single_channel_keeps_more_than_twice_its_share_after_the_rotation(width: int) -> None:
    rows_NH = torch.zeros(8, width)
    rows_NH[torch.arange(8), torch.arange(8) * (width // 8)] = 1000.0
    assert rotate(rows_NH).abs().max() <= 2.001 * 1000 / math.sqrt(width)


def test_bytes_of_a_blob_are_these() -> None:
    hidden_NH = torch.tensor([[1.0078125, -1.015625]])
    assert encode_hidden(hidden_NH, "bf16").data == b"\x81\x3f\x82\xbf"
    assert encode_hidden(hidden_NH, "bf16-split").data == b"\x7f\x7f" + b"\x02\x05"
    assert encode_hidden(torch.tensor([[1.0]]), "f32").data == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("codec", CODECS)
def test_blobs_of_another_length_and_scales_that_are_missing_are_refused(codec: HiddenCodec) -> None:
    blob = encode_hidden(torch.ones(3, 4), codec)
    for wrong in (HiddenBlob(blob.data[:-1], blob.scale_T), HiddenBlob(blob.data + b"\0", blob.scale_T)):
        with pytest.raises(DamageError):
            decode_hidden(wrong, codec, 4)
        with pytest.raises(DamageError, match="bytes"):
            check_blob(wrong, codec, (3, 4))
    if blob.scale_T is not None:
        with pytest.raises(DamageError, match="scales"):
            check_blob(HiddenBlob(blob.data, blob.scale_T[:-1]), codec, (3, 4))
        with pytest.raises(DamageError, match="finite"):
            check_blob(HiddenBlob(blob.data, blob.scale_T * np.float32(np.nan)), codec, (3, 4))


@pytest.mark.parametrize(("codec", "element"), [("f32", b"\0\0\x80\x7f"), ("bf16", b"\x80\xff"), ("fp8", b"\x7f"),
                                                ("q8", b"\x80"), ("q6", b"\x80"), ("q5", b"\x80")])
def test_an_element_that_no_writer_writes_is_found_without_decoding(codec: HiddenCodec, element: bytes) -> None:
    blob = encode_hidden(torch.ones(2, 3), codec)
    with pytest.raises(DamageError, match="1 elements are not finite"):
        check_blob(HiddenBlob(blob.data[:-len(element)] + element, blob.scale_T), codec, (2, 3))


def test_infinities_are_found_in_the_exponent_plane_without_decoding() -> None:
    blob = encode_hidden(torch.ones(2, 3), "bf16-split")
    with pytest.raises(DamageError, match="1 elements are not finite"):
        check_blob(HiddenBlob(b"\xff" + blob.data[1:]), "bf16-split", (2, 3))


logprobs = arrays(np.float32, st.integers(0, 50), elements=st.floats(-100, 0, width=32))


@given(logprobs, st.integers(3, 23))
def test_rounding_to_significant_bits_keeps_its_bound_and_the_order(values_N: NDArray[np.float32], bits: int) -> None:
    rounded_N = round_significant(values_N, bits)
    normal_N = np.abs(values_N) >= np.finfo(np.float32).tiny
    error_N = np.abs(rounded_N.astype(np.float64) - values_N)
    assert (error_N[normal_N] <= 2.0**-bits * np.abs(values_N[normal_N])).all()
    assert np.array_equal(round_significant(rounded_N, bits), rounded_N)
    order = np.argsort(values_N, kind="stable")
    assert (np.diff(rounded_N[order]) >= 0).all()
    assert not (rounded_N.view(np.uint32) & np.uint32((1 << (24 - bits)) - 1)).any()


@given(logprobs)
def test_twenty_four_bits_change_nothing(values_N: NDArray[np.float32]) -> None:
    assert np.array_equal(round_significant(values_N, 24).view(np.uint32), values_N.view(np.uint32))


def test_rounding_is_to_nearest_and_ties_go_to_even() -> None:
    values_N = np.array([-1.0, -1.03125, -1.0625, -1.09375, -1.1], np.float32)
    assert round_significant(values_N, 5).tolist() == [-1.0, -1.0, -1.0625, -1.125, -1.125]
    by_torch_N = torch.from_numpy(values_N).bfloat16().float().numpy()
    assert np.array_equal(round_significant(values_N, 8), by_torch_N)


@given(arrays(np.float64, 32, elements=st.floats(-30, 0)), st.integers(5, 12))
def test_rounding_moves_a_distribution_by_no_more_than_its_entropy_allows(logits: NDArray[np.float64],
                                                                          bits: int) -> None:
    logprobs_K = logits - np.log(np.exp(logits).sum())
    rounded_K = round_significant(logprobs_K.astype(np.float32), bits).astype(np.float64)
    distance = 0.5 * np.abs(np.exp(rounded_K) - np.exp(logprobs_K)).sum()
    entropy = -(np.exp(logprobs_K) * logprobs_K).sum()
    assert distance <= 0.5 * math.expm1(30.5 * 2.0**-bits) / 30.5 * entropy + 1e-6
