"""What hidden states cost on disk, what the codecs change of them, and how fast one core writes and reads them.

Size and error: states of a real target, every codec through a real sidecar file, one file per layer. A share is the
whole file over the bytes of the same states in bfloat16. It is given three times: for all positions, of which many
repeat, since prompts begin with the same template, and zstd finds them again; for response positions, which do not
repeat; and for the same joined to traces of 1,024 positions, because these are short (113 on average) and zstd has one
table of symbols per 128 KiB, which a short trace of `bf16-split` fills with exponents and mantissas alike. Errors are
the length of a row's error over the length of the row, against the engine's float32; the bf16 codecs are given
bfloat16, as a bfloat16 engine would. Beside them is what other tools write: bfloat16 in safetensors, `torch.save`
through gzip, and FP8 with one scale per token in safetensors.

Speed: bfloat16 rows to the bytes of the file and back, in memory, with and without zstd at the sidecar's level, in
traces of 1,024 positions; against gzip and safetensors on the same rows. Real states at the target's width; Gaussian
rows with a few large channels at the widths of large models. The clock is the thread's own processor time, so that
what else runs counts less; speeds still vary and are only printed.

Shapes: N positions, H hidden size.
"""

import gzip
import inspect
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from format_data import LAYERS, Captured, captured, machine, print_table
from safetensors.torch import load, save
from torch import Tensor

from distill_pipe.store.codec import FP8_MAX, HiddenBlob
from distill_pipe.store.hidden_codec import decode_hidden, encode_hidden, relative_errors
from distill_pipe.store.parquet_writer import write_table
from distill_pipe.store.sidecar import EncodedTrace, SidecarInfo, write_sidecar
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.trace import Trace

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]

# Largest share of bfloat16 and largest mean error.
LIMITS: dict[str, tuple[float, float]] = {"bf16-split": (0.70, 0.0), "q8": (0.47, 0.008), "q6": (0.34, 0.032),
                                          "q5": (0.275, 0.065)}
POSITIONS, REPETITIONS = 1024, 5
WIDE, OUTLIERS = (4096, 7168), 4
ZSTD = pa.Codec("zstd", compression_level=inspect.signature(write_table).parameters["level"].default)


@dataclass(frozen=True)
class Cost:
    """One way to store one layer: bytes over those of bfloat16, and relative errors of its rows."""

    share: float
    mean: float
    max: float


# --- size and error ---

@pytest.mark.timeout(1800)
def test_every_codec_keeps_its_share_and_its_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    data, folder = captured(tmp_path_factory), tmp_path_factory.mktemp("hidden")
    ways = {**{codec: through_a_sidecar(data, codec, folder) for codec in get_args(HiddenCodec)},
            "bf16 in safetensors": in_safetensors, "bf16 in torch.save, gzip -6": gzipped,
            "FP8 per token in safetensors": fp8_in_safetensors}
    everywhere, responses, joined = ({name: [way(kept(data.traces, n)) for n in LAYERS] for name, way in ways.items()}
                                     for kept in (states, response_states, joined_states))
    positions = sum(t.num_tokens - 1 for t in data.traces)
    print_table(f"Hidden states: {positions} positions, of them {sum(t.num_rows for t in data.traces)} of responses, "
                f"width {data.run.spec.target.hidden_size}, layers {LAYERS} averaged",
                ("stored", "share of bf16", "responses", "responses, joined", "mean error", "responses", "max error"),
                [(n, *(f"{mean_share(costs[n]):.3f}" for costs in (everywhere, responses, joined)),
                  percent(mean_error(everywhere[n])), percent(mean_error(responses[n])),
                  percent(max(c.max for c in everywhere[n]))) for n in ways])
    print_table("The same by layer: share of all positions, mean error, largest error",
                ("stored", *(f"layer {n}" for n in LAYERS)),
                [(n, *(f"{c.share:.3f}, {percent(c.mean)}, {percent(c.max)}" for c in everywhere[n])) for n in ways])
    for codec, (share, error) in LIMITS.items():
        assert mean_share(everywhere[codec]) <= share, codec
        assert mean_error(everywhere[codec]) <= error, codec


def states(traces: Sequence[Trace], layer: int) -> list[Tensor]:
    """One layer's float32 states of each trace."""
    return [torch.from_numpy(t.hidden[layer]) for t in traces]


def response_states(traces: Sequence[Trace], layer: int) -> list[Tensor]:
    """Those from the first on that predicts a token of the response."""
    return [h[int(t.positions_R[0]):] for t, h in zip(traces, states(traces, layer), strict=True)]


def joined_states(traces: Sequence[Trace], layer: int) -> list[Tensor]:
    """The same, end to end, as if fewer traces were longer."""
    return list(torch.cat(response_states(traces, layer)).split(POSITIONS))


Way = Callable[[list[Tensor]], Cost]


def through_a_sidecar(data: Captured, codec: HiddenCodec, folder: Path) -> Way:
    """A codec as the store writes it: the file has the scales, the ordinals and the footer too."""
    def way(kept: list[Tensor]) -> Cost:
        exact = [h.bfloat16() if codec.startswith("bf16") else h for h in kept]
        blobs = [encode_hidden(h, codec) for h in exact]
        info = SidecarInfo(fingerprint=data.run.fingerprint, shard=0, codec=codec, hidden_size=kept[0].shape[1],
                           layers=(0,))
        path = folder / "sidecar.parquet"
        # Joined traces are fewer; only the ordinals are taken from these.
        write_sidecar(path, [EncodedTrace(t, {0: b}) for t, b in zip(data.traces, blobs, strict=False)], info)
        decoded = [decode_hidden(b, codec, info.hidden_size, dtype=torch.float32) for b in blobs]
        return cost(path.stat().st_size, exact, decoded)
    return way


def in_safetensors(kept: list[Tensor]) -> Cost:
    """One file per trace, as is."""
    exact = [h.bfloat16() for h in kept]
    return cost(sum(len(save({"hidden": h})) for h in exact), exact, exact)


def gzipped(kept: list[Tensor]) -> Cost:
    """One file per trace, as is, through gzip at its usual level."""
    exact = [h.bfloat16() for h in kept]
    return cost(sum(len(gzip_save(h)) for h in exact), exact, exact)


def fp8_in_safetensors(kept: list[Tensor]) -> Cost:
    """One file per trace: float8_e4m3fn, and a float32 scale per position that takes its largest element to 448."""
    size, decoded = 0, []
    for h in kept:
        scale_N1 = h.abs().amax(1, keepdim=True) / FP8_MAX
        codes = (h / scale_N1).to(torch.float8_e4m3fn)
        size += len(save({"hidden": codes, "scale": scale_N1}))
        decoded.append(codes.float() * scale_N1)
    return cost(size, kept, decoded)


def cost(size: int, exact: Sequence[Tensor], decoded: Sequence[Tensor]) -> Cost:
    error_N = torch.cat([relative_errors(e, d) for e, d in zip(exact, decoded, strict=True)])
    return Cost(size / sum(2 * h.numel() for h in exact), float(error_N.mean()), float(error_N.max()))


def mean_share(costs: Sequence[Cost]) -> float:
    return statistics.fmean(c.share for c in costs)


def mean_error(costs: Sequence[Cost]) -> float:
    return statistics.fmean(c.mean for c in costs)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share else "0"


# --- speed ---

@dataclass(frozen=True)
class Coder:
    """A way to bytes and back for one piece. What `encode` returns goes into `decode`."""

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]


@pytest.mark.timeout(1800)
def test_encoding_and_decoding_on_one_core(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    data = captured(tmp_path_factory)
    print(f"\nOne core of: {machine()}. MB are 1e6 bytes of bfloat16; medians of {REPETITIONS}.")
    real = torch.cat(states(data.traces[::4], 15)).bfloat16()[:8 * POSITIONS]
    speeds(f"H={real.shape[1]}, states of layer 15", real)
    for width in WIDE:
        speeds(f"H={width}, Gaussian rows with {OUTLIERS} channels 100 times as large", gaussian(width))


def gaussian(width: int) -> Tensor:
    """Rows that are as hard as real ones: a few channels dwarf the rest."""
    rows_NH = torch.randn(POSITIONS, width, generator=torch.Generator().manual_seed(0))
    rows_NH[:, ::width // OUTLIERS] *= 100
    return rows_NH.bfloat16()


def speeds(title: str, rows_NH: Tensor) -> None:
    """Print what each codec does to these rows, and the same beside gzip and safetensors."""
    width = rows_NH.shape[1]
    gzip_in, gzip_out = megabytes_per_second(rows_NH, Coder(gzip_save, gzip_load), repetitions=3)
    safe_in, safe_out = megabytes_per_second(rows_NH, Coder(safe_save, safe_load))
    table: list[tuple[object, ...]] = []
    for codec in get_args(HiddenCodec):
        raw_in, raw_out = megabytes_per_second(rows_NH, raw_coder(codec, width))
        zstd_in, zstd_out = megabytes_per_second(rows_NH, zstd_coder(codec, width))
        table.append((codec, *(f"{v:.0f}" for v in (raw_in, zstd_in, raw_out, zstd_out)), f"{zstd_in / gzip_in:.1f}",
                      f"{zstd_out / gzip_out:.1f}", f"{zstd_in / safe_in:.2f}", f"{zstd_out / safe_out:.2f}"))
    table.append(("gzip -6 of torch.save", "", f"{gzip_in:.0f}", "", f"{gzip_out:.0f}", "", "", "", ""))
    table.append(("safetensors, in memory", f"{safe_in:.0f}", "", f"{safe_out:.0f}", "", "", "", "", ""))
    print_table(f"MB/s, {title}", ("stored", "encode", "encode, zstd", "decode", "zstd, decode", "to gzip",
                                   "from gzip", "to safetensors", "from safetensors"), table)


def megabytes_per_second(rows_NH: Tensor, coder: Coder, repetitions: int = REPETITIONS) -> tuple[float, float]:
    """Encoding and decoding, piece by piece; one round before the clock starts."""
    pieces = list(rows_NH.split(POSITIONS))
    stored = [coder.encode(piece) for piece in pieces]
    for blob, piece in zip(stored, pieces, strict=True):
        assert coder.decode(blob).shape == piece.shape
    size = rows_NH.numel() * rows_NH.element_size() / 1e6
    return (size / median_seconds(lambda: [coder.encode(piece) for piece in pieces], repetitions),
            size / median_seconds(lambda: [coder.decode(blob) for blob in stored], repetitions))


def median_seconds(work: Callable[[], object], repetitions: int) -> float:
    taken = []
    for _ in range(repetitions):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return statistics.median(taken)


def raw_coder(codec: HiddenCodec, width: int) -> Coder:
    """The codec alone."""
    return Coder(lambda rows_NH: encode_hidden(rows_NH, codec), lambda blob: decode_hidden(blob, codec, width))


def zstd_coder(codec: HiddenCodec, width: int) -> Coder:
    """The codec, and what Parquet does with its bytes. The scales, 4 bytes per row, are left out."""
    def encode(rows_NH: Tensor) -> tuple[pa.Buffer, int, np.ndarray | None]:
        blob = encode_hidden(rows_NH, codec)
        return ZSTD.compress(blob.data), len(blob.data), blob.scale_T

    def decode(stored: tuple[pa.Buffer, int, np.ndarray | None]) -> Tensor:
        packed, size, scale_N = stored
        return decode_hidden(HiddenBlob(memoryview(ZSTD.decompress(packed, size)), scale_N), codec, width)
    return Coder(encode, decode)


def gzip_save(rows_NH: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(rows_NH.clone(), file)
    return gzip.compress(file.getvalue(), 6)


def gzip_load(packed: bytes) -> Tensor:
    return torch.load(io.BytesIO(gzip.decompress(packed)))


def safe_save(rows_NH: Tensor) -> bytes:
    return save({"hidden": rows_NH.contiguous()})


def safe_load(data: bytes) -> Tensor:
    # A copy, because without one nothing is read yet.
    return load(data)["hidden"].clone()
