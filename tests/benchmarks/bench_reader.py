"""What a reader delivers to one core, beside the files that other trainers read: tokens per second, and bytes of disk.

The same tokens and states lie on disk in four forms: a dataset of ours with `q6`, another with `bf16-split`, one
`torch.save` file per sample as SpecForge reads them, and one safetensors file per sample as speculators reads them. A
trainer gets packed batches of at most 8,192 tokens with three layers. For the target's distribution, ours hold a head
with tail samples; the others hold the last hidden state, as bfloat16, and their trainers still multiply it by the
lm_head, which is not counted here.

Two speeds, of one thread. Processor: seconds of processor time with all files in the page cache. Disk: wall-clock
seconds after the files were thrown out of the page cache (`posix_fadvise`, DONTNEED), nothing overlapping; the host of
a virtual machine may still hold them, so the speed of the disk is measured in the same way, by reading a file. Both are
the best of some rounds. The hashes of our files were checked in a round before; what that costs is printed apart.

Then what both mean together: tokens per second where a core has so much bandwidth of a disk or network to itself and
reads while it decodes, as every trainer's loader does with more threads or processes than one: the lesser of tokens per
second of processor and `bandwidth / bytes per token`.

Shapes: T tokens, R rows, H hidden size, L layers.
"""

import gzip
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from format_data import machine, print_table
from safetensors.torch import load_file, save_file
from tiny_datasets import Shape, start_run
from torch import Tensor

from distill_pipe.consume import ShardReader
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import Fragment, Run, encode_record, fragment_name, shard_name
from distill_pipe.store.plan import shard_range
from distill_pipe.store.root import LocalRoot, sha256_of
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.trace import Trace

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]

LAYERS, LAST, HIDDEN_SIZE, VOCABULARY = (2, 16, 29), 32, 4096, 128_256
SHARDS, SAMPLES, TOKENS = 2, 32, 512
TOP_K, TAIL, BATCH_TOKENS, ROUNDS = 32, 8, 8192, 3
MANY_SHARDS, OPENED = 10_000, 8
MEGABYTES_PER_SECOND = (50, 100, 200, 500, 1000)
# Which of the forms are plain files of others.
PLAIN = (2, 3)


@dataclass(frozen=True)
class Form:
    """One way to store the samples: its files, and how a trainer goes through them once."""

    name: str
    files: tuple[Path, ...]
    samples: int
    epoch: Callable[[], int]

    @property
    def bytes_per_token(self) -> float:
        return sum(path.stat().st_size for path in self.files) / (self.samples * TOKENS)


@dataclass(frozen=True)
class Speed:
    """Processor seconds per token in the page cache, and wall-clock seconds per token from disk."""

    processor: float
    disk: float


def states(ordinal: int, layer: int) -> Tensor:
    """Rows that are as hard to code as real ones: Gaussian, and a few channels dwarf the rest."""
    rows_TH = torch.randn(TOKENS - 1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1000 * ordinal + layer))
    rows_TH[:, ::1024] *= 100
    return rows_TH.bfloat16()


def synthetic_trace(ordinal: int, tokens: int = TOKENS, layers: tuple[int, ...] = LAYERS) -> Trace:
    """A response of which three quarters are supervised."""
    random = np.random.default_rng(ordinal)
    loss_mask_T = np.arange(tokens) >= tokens // 4
    rows = int(loss_mask_T[1:].sum())
    logprobs_RK = -np.sort(-np.log(random.dirichlet(np.full(TOP_K + 1, 0.3), rows) + 1e-9)[:, :TOP_K], axis=1)
    tail_mass_R = np.clip(1 - np.exp(logprobs_RK).sum(1), 0, 1)
    return Trace(
        ordinal=ordinal, prompt_id=f"p{ordinal}", domain=None, finish_reason="stop",
        token_ids_T=random.integers(0, VOCABULARY, tokens).astype(np.int32), loss_mask_T=loss_mask_T,
        logsumexp_R=random.normal(20, 2, rows).astype(np.float32), tail_mass_R=tail_mass_R.astype(np.float32),
        next_logprob_R=-random.exponential(1, rows).astype(np.float32),
        topk_counts_R=np.full(rows, TOP_K, np.int32),
        topk_ids_N=random.integers(0, VOCABULARY, rows * TOP_K).astype(np.int32),
        topk_logprobs_N=logprobs_RK.astype(np.float32).ravel(), tail_counts_R=np.full(rows, TAIL, np.int32),
        tail_ids_N=random.integers(0, VOCABULARY, rows * TAIL).astype(np.int32),
        tail_logprobs_N=random.normal(-12, 2, rows * TAIL).astype(np.float32),
        hidden={n: states(ordinal, n).view(torch.int16).numpy().view(np.uint16) for n in layers})


def shape(codec: HiddenCodec, layers: tuple[int, ...] = LAYERS, samples: int = SAMPLES) -> Shape:
    return Shape(vocab_size=VOCABULARY, hidden_size=HIDDEN_SIZE, num_layers=LAST, layers=layers, hidden_codec=codec,
                 top_k=TOP_K, tail_samples=TAIL, logprob_bits=7, prompts_per_shard=samples)


def committed(root: LocalRoot, run: Run, shard: int, traces: Iterable[Trace]) -> Fragment:
    return commit_shard(root, run, shard, [encode_trace(t, run.spec.capture.hidden_codec) for t in traces], [])


def ours(folder: Path, codec: HiddenCodec, name: str) -> Form:
    root, run = LocalRoot(folder / codec), start_run(folder / codec, SHARDS * SAMPLES, shape(codec))
    for shard in range(SHARDS):
        committed(root, run, shard, (synthetic_trace(o) for o in range(*shard_range(run, shard))))
    reader = ShardReader(root.path, layers=LAYERS, batch_tokens=BATCH_TOKENS, threads=0)
    files = [p for part in ("data", "hidden_states") for p in (root.path / part).rglob("*.parquet")]
    return Form(name, tuple(files), SHARDS * SAMPLES, lambda: sum(len(batch.token_ids_T) for batch in reader))


def specforge(folder: Path, compressed: bool) -> Form:
    """`torch.save` of one dictionary per sample, as SpecForge's offline reader takes it, plain or through gzip."""
    folder.mkdir()
    paths = []
    for ordinal in range(SHARDS * SAMPLES // (4 if compressed else 1)):
        sample = peer_sample(ordinal)
        record = {"input_ids": sample["token_ids"], "loss_mask": sample["loss_mask"],
                  "aux_hidden_state": sample["hidden_states"][None, :, :-1].flatten(2).contiguous(),
                  "hidden_state": sample["hidden_states"][None, :, -1].contiguous()}
        paths.append(folder / f"data_{ordinal}.ckpt{'.gz' if compressed else ''}")
        file = io.BytesIO()
        torch.save(record, file)
        paths[-1].write_bytes(gzip.compress(file.getvalue(), 6) if compressed else file.getvalue())

    def load(path: Path) -> dict[str, Tensor]:
        source = io.BytesIO(gzip.decompress(path.read_bytes())) if compressed else path
        record: dict[str, Tensor] = torch.load(source, weights_only=True)
        return {"ids": record["input_ids"], "mask": record["loss_mask"], "aux": record["aux_hidden_state"][0],
                "last": record["hidden_state"][0]}
    name = f"torch.save per sample{', gzip' if compressed else ''}"
    return Form(name, tuple(paths), len(paths), lambda: packed(map(load, paths)))


def speculators(folder: Path) -> Form:
    """`hs_{i}.safetensors` with `hidden_states[T, L + 1, H]`, as speculators writes it."""
    folder.mkdir()
    paths = []
    for ordinal in range(SHARDS * SAMPLES):
        paths.append(folder / f"hs_{ordinal}.safetensors")
        sample = peer_sample(ordinal)
        save_file({name: sample[name] for name in ("token_ids", "hidden_states")}, paths[-1])

    def load(path: Path) -> dict[str, Tensor]:
        record = load_file(path)
        return {"ids": record["token_ids"], "aux": record["hidden_states"][:, :-1].flatten(1),
                "last": record["hidden_states"][:, -1]}
    return Form("safetensors per sample", tuple(paths), len(paths), lambda: packed(map(load, paths)))


def peer_sample(ordinal: int) -> dict[str, Tensor]:
    layers_TLH = torch.stack([states(ordinal, n) for n in (*LAYERS, LAST)], 1)
    return {"token_ids": torch.zeros(TOKENS, dtype=torch.int64), "loss_mask": torch.ones(TOKENS, dtype=torch.int64),
            "hidden_states": torch.nn.functional.pad(layers_TLH, (0, 0, 0, 0, 0, 1))}


def packed(samples: Iterator[dict[str, Tensor]]) -> int:
    """Samples joined to batches of as many tokens as ours have; how many tokens there were."""
    tokens, held = 0, []
    for sample in samples:
        held.append(sample)
        if len(held) == BATCH_TOKENS // TOKENS:
            batch = {name: torch.cat([one[name] for one in held]) for name in held[0]}
            tokens += len(batch["ids"])
            held = []
    return tokens


def forget(paths: Iterable[Path]) -> None:
    """Throw files out of the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measured(form: Form) -> Speed:
    form.epoch()
    warm, cold = [], []
    for _ in range(ROUNDS):
        started = time.process_time()
        tokens = form.epoch()
        warm.append((time.process_time() - started) / tokens)
    for _ in range(ROUNDS):
        forget(form.files)
        started = time.perf_counter()
        tokens = form.epoch()
        cold.append((time.perf_counter() - started) / tokens)
    return Speed(min(warm), min(cold))


def disk_speed(paths: Iterable[Path]) -> float:
    """MB/s of plain reads of files that are not in the page cache."""
    paths = list(paths)[:16]
    forget(paths)
    started = time.perf_counter()
    size = sum(len(path.read_bytes()) for path in paths)
    return size / 1e6 / (time.perf_counter() - started)


def test_tokens_per_second_beside_files_of_other_trainers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    forms = [ours(tmp_path, "q6", "q6"), ours(tmp_path, "bf16-split", "bf16-split"), speculators(tmp_path / "hs"),
             specforge(tmp_path / "ckpt", False), specforge(tmp_path / "gz", True)]
    speeds = [measured(form) for form in forms]
    print(f"\n{machine()}; {SHARDS * SAMPLES} samples of {TOKENS} tokens, H={HIDDEN_SIZE}, {len(LAYERS)} layers and "
          f"the target; disk {disk_speed(forms[3].files):.0f} MB/s")
    print_table("One thread, and how it compares with the better of the plain files of others", (
        "stored as", "KB/token on disk", "1000 tokens/s of processor", "MB/s of the layers as bf16", "ratio",
        "1000 tokens/s from disk", "ratio"), [speed_row(i, forms, speeds) for i in range(len(forms))])
    print_table("1000 tokens/s by MB/s that a core has to itself, and the same ratio", (
        "stored as", *map(str, MEGABYTES_PER_SECOND)), [bandwidth_row(i, forms, speeds) for i in range(len(forms))])
    for form in forms[:2]:
        started = time.process_time()
        size = sum(path.stat().st_size for path in form.files if sha256_of(path))
        print(f"sha256 of {form.name}: {size / 1e6 / (time.process_time() - started):.0f} MB/s, once per process")


def speed_row(i: int, forms: list[Form], speeds: list[Speed]) -> tuple[object, ...]:
    layers_MB = 2e-6 * HIDDEN_SIZE * len(LAYERS)
    warm, cold = (min(getattr(speeds[n], name) for n in PLAIN) for name in ("processor", "disk"))
    return (forms[i].name, f"{forms[i].bytes_per_token / 1e3:.1f}", f"{1e-3 / speeds[i].processor:.1f}",
            f"{layers_MB / speeds[i].processor:.0f}", f"{warm / speeds[i].processor:.2f}",
            f"{1e-3 / speeds[i].disk:.1f}", f"{cold / speeds[i].disk:.2f}")


def bandwidth_row(i: int, forms: list[Form], speeds: list[Speed]) -> tuple[object, ...]:
    def speed(n: int, megabytes: int) -> float:
        return min(1 / speeds[n].processor, megabytes * 1e6 / forms[n].bytes_per_token)
    return (forms[i].name, *(
        f"{speed(i, mb) / 1e3:.1f} ({speed(i, mb) / max(speed(n, mb) for n in PLAIN):.1f})"
        for mb in MEGABYTES_PER_SECOND))


def test_the_first_batch_of_ten_thousand_shards(tmp_path: Path) -> None:
    """All names and records are there. The shards that the first batch opens are real, the others are links to them."""
    layers = LAYERS[:1]
    run = start_run(tmp_path, MANY_SHARDS * 4, shape("q6", layers, samples=4))
    root = LocalRoot(tmp_path)
    first = np.random.default_rng([0, 0]).permutation(MANY_SHARDS)[:OPENED].tolist()
    for shard in first:
        traces = [synthetic_trace(ordinal, layers=layers) for ordinal in range(*shard_range(run, shard))]
        model = committed(root, run, shard, traces)
    for shard in set(range(MANY_SHARDS)) - set(first):
        path = tmp_path / shard_name(shard)
        info = msgspec.structs.replace(model.info, shard=shard, first_ordinal=4 * shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / model.file.name, path)
        (tmp_path / fragment_name(shard)).parent.mkdir(parents=True, exist_ok=True)
        record = Fragment(file=msgspec.structs.replace(model.file, name=shard_name(shard)), info=info)
        (tmp_path / fragment_name(shard)).write_bytes(encode_record(record))
    started = time.perf_counter()
    reader = ShardReader(tmp_path, layers=layers, batch_tokens=BATCH_TOKENS)
    made = time.perf_counter()
    batch = next(iter(reader))
    print(f"\n{MANY_SHARDS} shards: reader made in {made - started:.2f} s, first batch of {len(batch.token_ids_T)} "
          f"tokens after {time.perf_counter() - started:.2f} s; all lengths in ", end="")
    started = time.perf_counter()
    reader.num_steps()
    print(f"{time.perf_counter() - started:.2f} s")
