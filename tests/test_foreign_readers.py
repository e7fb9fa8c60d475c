"""Readers without this package: DuckDB, Polars, pandas, pyarrow.dataset, Hugging Face `datasets`, and a decoder written
from FORMAT.md.

Each recomputes the same numbers from the main shards by the alignment and list rules of `schemas/FORMAT.md`, and must
agree with `inspect` and `status`. What is caught: a layout, type or setting that only our own reader understands.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.compute as pc
import pyarrow.dataset
import pytest
import torch
from tiny_datasets import Shape, make_dataset, random_trace

from distill_pipe.consume.losses import lk_alpha_loss
from distill_pipe.consume.reader import ShardReader
from distill_pipe.store.card import write_card
from distill_pipe.store.inspect import inspect_trace
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.status import status

datasets = pytest.importorskip("datasets")

SHAPE = Shape(logprob_bits=7)
PROMPTS = 10


@dataclass(frozen=True)
class Expected:
    """What our own tools say: the first row of trace 0, and the mean tail mass of all rows."""

    position: int
    top_id: int
    top_probability: float
    tail_mass_mean: float


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards and a card."""
    path = tmp_path_factory.mktemp("data") / "dataset"
    run = make_dataset(path, PROMPTS, SHAPE)
    write_card(LocalRoot(path), run)
    return path


@pytest.fixture(scope="module")
def expected(root: Path) -> Expected:
    tokens, _ = inspect_trace(LocalRoot(root), 0, 1)
    first = next(t for t in tokens if t.candidates)
    mean = status(LocalRoot(root)).tail_mass_mean
    assert mean is not None
    return Expected(first.position, *first.candidates[0], mean)


def first_row(loss_mask: Sequence[bool], topk_ids: Sequence[int], topk_logprobs: Sequence[float]
              ) -> tuple[int, int, float]:
    """Row 0 of a trace by the rules of FORMAT.md: the first t with loss_mask[t+1], and the head's first entry."""
    return list(loss_mask[1:]).index(True), topk_ids[0], math.exp(topk_logprobs[0])


def decode_bf16_split(blob: bytes, num_tokens: int, hidden_size: int) -> list[list[float]]:
    """FORMAT.md section 7.1, in plain Python: two planes, bits rotated left by one, upper half of a float32."""
    elements = (num_tokens - 1) * hidden_size
    assert len(blob) == 2 * elements
    values = []
    for i in range(elements):
        rotated = blob[i] * 256 + blob[elements + i]
        bits = rotated // 2 + (rotated % 2) * 0x8000
        values.append(struct.unpack("<f", struct.pack("<I", bits * 65536))[0])
    return [values[r * hidden_size:(r + 1) * hidden_size] for r in range(num_tokens - 1)]


def test_duckdb_reads_main_shards(root: Path, expected: Expected) -> None:
    with duckdb.connect() as database:
        database.read_parquet(f"{root}/data/train/*/*.parquet").create_view("traces")
        row = database.execute("SELECT list_position(loss_mask[2:], true) - 1, topk_ids[1], exp(topk_logprobs[1]) "
                               "FROM traces WHERE ordinal = 0").fetchone()
        mean = database.execute("SELECT avg(m) FROM (SELECT unnest(tail_mass) m FROM traces)").fetchone()
        counts = database.execute("SELECT bool_and(list_sum(topk_counts) = len(topk_ids)), "
                                  "bool_and(list_sum(tail_counts) = len(tail_ids)), count(*) FROM traces").fetchone()
    assert row == (expected.position, expected.top_id, pytest.approx(expected.top_probability, rel=1e-6))
    assert mean == (pytest.approx(expected.tail_mass_mean, rel=1e-5),)
    assert counts == (True, True, PROMPTS)


def test_duckdb_joins_the_sidecar_by_ordinal(root: Path) -> None:
    with duckdb.connect() as database:
        database.read_parquet(f"{root}/data/train/*/*.parquet").create_view("traces")
        database.read_parquet(f"{root}/hidden_states/train/*/*.parquet").create_view("hidden")
        rows = database.execute("SELECT octet_length(layer_02), len(token_ids) FROM traces JOIN hidden USING (ordinal)"
                                ).fetchall()
    assert len(rows) == PROMPTS
    assert all(size == 2 * SHAPE.hidden_size * (tokens - 1) for size, tokens in rows)


def test_polars_reads_main_shards(root: Path, expected: Expected) -> None:
    frame = pl.scan_parquet(f"{root}/data/train/*/*.parquet")
    row = frame.filter(pl.col("ordinal") == 0).select(
        pl.col("loss_mask").list.slice(1), pl.col("topk_ids").list.first(), pl.col("topk_logprobs").list.first().exp(),
    ).collect().row(0)
    assert row[0].index(True) == expected.position
    assert row[1:] == (expected.top_id, pytest.approx(expected.top_probability, rel=1e-6))
    mean = frame.select(pl.col("tail_mass").explode().mean()).collect().item()
    assert mean == pytest.approx(expected.tail_mass_mean, rel=1e-5)


def test_polars_joins_the_sidecar_by_ordinal(root: Path) -> None:
    main = pl.read_parquet(f"{root}/data/train/*/*.parquet", columns=["ordinal", "token_ids"])
    hidden = pl.read_parquet(f"{root}/hidden_states/train/*/*.parquet")
    joined = main.join(hidden, on="ordinal").select(pl.col("layer_02").bin.size(), pl.col("token_ids").list.len())
    assert len(joined) == PROMPTS
    assert all(size == 2 * SHAPE.hidden_size * (tokens - 1) for size, tokens in joined.iter_rows())


def test_pandas_reads_main_shards(root: Path, expected: Expected) -> None:
    frame = pd.read_parquet(root / "data" / "train").set_index("ordinal")
    position, top_id, probability = first_row(frame.loc[0, "loss_mask"].tolist(), frame.loc[0, "topk_ids"],
                                              frame.loc[0, "topk_logprobs"])
    assert (position, top_id) == (expected.position, expected.top_id)
    assert probability == pytest.approx(expected.top_probability, rel=1e-6)
    assert np.concatenate(frame["tail_mass"].tolist()).mean() == pytest.approx(expected.tail_mass_mean, rel=1e-5)


@pytest.mark.parametrize("codec", get_args(HiddenCodec))
def test_foreign_readers_see_the_same_blobs_and_scales_in_every_codec(tmp_path: Path, codec: HiddenCodec) -> None:
    make_dataset(tmp_path, 3, Shape(layers=(2,), hidden_codec=codec))
    (path,) = (tmp_path / "hidden_states").rglob("*.parquet")
    wanted = pyarrow.dataset.dataset(path).to_table().to_pydict()
    assert pl.read_parquet(path).to_dict(as_series=False) == wanted
    with duckdb.connect() as database:
        cursor = database.execute(f"SELECT * FROM '{path}'")  # noqa: S608 - a path of the test's own
        names = [column[0] for column in cursor.description]
        assert dict(zip(names, map(list, zip(*cursor.fetchall(), strict=True)), strict=True)) == wanted
    records = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert {name: list(records[name]) for name in records.column_names} == wanted


def test_duckdb_and_polars_read_token_ids_of_a_vocabulary_of_a_quarter_million(tmp_path: Path) -> None:
    make_dataset(tmp_path, 2, Shape(vocab_size=262_144, layers=()))
    largest = max(int(random_trace(i, Shape(vocab_size=262_144, layers=())).topk_ids_N.max()) for i in range(2))
    assert largest > 2**17
    assert pl.read_parquet(f"{tmp_path}/data/train/*/*.parquet")["topk_ids"].explode().max() == largest
    with duckdb.connect() as database:
        row = database.execute(f"SELECT max(list_max(topk_ids)) FROM '{tmp_path}/data/train/*/*.parquet'"  # noqa: S608
                               ).fetchone()
    assert row == (largest,)
    (batch,) = ShardReader(tmp_path)
    assert batch.target.topk_ids_RK.max() == largest
    assert lk_alpha_loss(torch.zeros(len(batch.target), 262_144), batch.target).alpha.isfinite()


def test_pyarrow_dataset_reads_main_shards(root: Path, expected: Expected) -> None:
    # The whole folder, so that whatever lies beside the shards would be noticed.
    table = pyarrow.dataset.dataset(root / "data", format="parquet").to_table()
    assert table.num_rows == PROMPTS
    record = table.filter(pc.field("ordinal") == 0).to_pylist()[0]
    position, top_id, probability = first_row(record["loss_mask"], record["topk_ids"], record["topk_logprobs"])
    assert (position, top_id) == (expected.position, expected.top_id)
    assert probability == pytest.approx(expected.top_probability, rel=1e-6)
    mean = pc.mean(pc.list_flatten(table["tail_mass"])).as_py()
    assert mean == pytest.approx(expected.tail_mass_mean, rel=1e-5)


def load(root: Path, config: str, cache: Path) -> "datasets.Dataset":
    return datasets.load_dataset(str(root), config, split="train", cache_dir=str(cache))


def test_hugging_face_datasets_loads_the_main_shards_by_default(root: Path, expected: Expected, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(root), cache_dir=str(tmp_path))
    assert set(loaded) == {"train"}
    records = loaded["train"]
    assert sorted(records["ordinal"]) == list(range(PROMPTS))
    record = next(r for r in records if r["ordinal"] == 0)
    position, top_id, probability = first_row(record["loss_mask"], record["topk_ids"], record["topk_logprobs"])
    assert (position, top_id) == (expected.position, expected.top_id)
    assert probability == pytest.approx(expected.top_probability, rel=1e-6)
    mean = np.concatenate([r["tail_mass"] for r in records]).mean()
    assert mean == pytest.approx(expected.tail_mass_mean, rel=1e-5)


def test_hugging_face_datasets_finds_both_configs(root: Path, tmp_path: Path) -> None:
    assert sorted(datasets.get_dataset_config_names(str(root))) == ["default", "hidden_states"]
    hidden = load(root, "hidden_states", tmp_path)
    assert hidden.column_names == ["ordinal", "layer_01", "layer_02", "layer_04"]
    assert sorted(hidden["ordinal"]) == list(range(PROMPTS))


def test_hugging_face_datasets_streams_main_shards(root: Path) -> None:
    stream = datasets.load_dataset(str(root), split="train", streaming=True)
    assert [record["ordinal"] for record in stream] == list(range(PROMPTS))


def test_dataset_without_hidden_states_still_loads(tmp_path: Path) -> None:
    run = make_dataset(tmp_path / "heads", 3, Shape(layers=()))
    write_card(LocalRoot(tmp_path / "heads"), run)
    assert len(load(tmp_path / "heads", "default", tmp_path / "cache")) == 3


def test_decoder_written_from_the_format_reads_every_state_of_a_foreign_table(root: Path, tmp_path: Path) -> None:
    lengths = {r["ordinal"]: len(r["token_ids"]) for r in load(root, "default", tmp_path)}
    for record in load(root, "hidden_states", tmp_path):
        stored = random_trace(record["ordinal"], SHAPE).hidden
        for layer, exact_TH in stored.items():
            decoded = decode_bf16_split(record[f"layer_{layer:02d}"], lengths[record["ordinal"]], SHAPE.hidden_size)
            assert torch.equal(torch.tensor(decoded), torch.from_numpy(exact_TH).bfloat16().float())


def test_every_row_and_its_next_token_line_up_without_our_reader(root: Path) -> None:
    for record in pyarrow.dataset.dataset(root / "data", format="parquet").to_table().to_pylist():
        positions = [t for t in range(len(record["token_ids"]) - 1) if record["loss_mask"][t + 1]]
        assert len(positions) == len(record["logsumexp"]) == len(record["topk_counts"])
        start = 0
        for r, t in enumerate(positions):
            head = dict(zip(record["topk_ids"][start:start + record["topk_counts"][r]],
                            record["topk_logprobs"][start:start + record["topk_counts"][r]], strict=True))
            start += record["topk_counts"][r]
            token = record["token_ids"][t + 1]
            if token in head:
                assert abs(head[token] - record["next_logprob"][r]) <= 2**-7 * abs(head[token]) * 1.02
            else:
                assert record["next_logprob"][r] <= min(head.values()) * (1 - 1.02 * 2**-7)
        assert start == len(record["topk_ids"])
