"""Runs of the fake target, and what they stored, as rows that can be compared."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from runs import prompt_records, write_corpus

from distill_pipe.produce.fake_engine import FakeEngine
from distill_pipe.produce.fake_target import ByteRenderer
from distill_pipe.produce.generate import freeze, prepare
from distill_pipe.produce.job import Job, load_job
from distill_pipe.produce.schedule import Work
from distill_pipe.produce.worker import ShardWorker
from distill_pipe.store.manifest import Run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import LocalRoot, Root, open_root
from distill_pipe.store.verify import Report, verify

SETTINGS = ("--target", "fake", "--set", "sampling.max_tokens=12", "--set", "engine.max_num_seqs=4", "--set",
            "prompts_per_shard=4")


def questions(count: int) -> list[str]:
    return [f"What is {n} times {n + 1}?" for n in range(count)]


def fake_job(folder: Path, out: str, *settings: str, prompts: list[str] | None = None) -> Job:
    corpus = write_corpus(folder / "c.jsonl", prompt_records(prompts or questions(8)))
    return load_job(None, ("sampling.max_tokens=12", "engine.max_num_seqs=4", "prompts_per_shard=4", *settings),
                    {"target": "fake", "corpus": str(corpus), "out": str(folder / out)})


def run_here(job: Job, order: list[int] | None = None) -> tuple[Run, Root]:
    """The whole run in this process, without Ray, shards started in `order`."""
    _, spec = prepare(job)
    root = open_root(job.out)
    run = freeze(root, spec, job)
    worker = ShardWorker(FakeEngine(run, root, job.engine.max_num_seqs), ByteRenderer(), root, run)
    left, fresh = set(range(num_shards(run))), order or list(range(num_shards(run)))
    deadline = time.monotonic() + 300
    while left:
        assert time.monotonic() < deadline
        for outcome in worker.advance(map(Work, fresh), 0.2).outcomes:
            assert outcome.fragment is not None, outcome.message
            left.discard(outcome.shard)
        fresh = []
    return run, root


def stored_rows(out: Path) -> dict[str, pa.Table]:
    """All that a dataset holds, by folder, in order, without the records in the footers, which name attempts."""
    return {folder: pa.concat_tables([pq.read_table(path).replace_schema_metadata(None)
                                      for path in sorted((out / folder).rglob("*.parquet"))]).sort_by("ordinal")
            for folder in ("data", "hidden_states") if (out / folder).exists()}


def assert_same_rows(out: Path, undisturbed: Path) -> None:
    """Byte for byte, whatever happened on the way; what was quarantined is left out."""
    given_up = pa.array(quarantined(out), pa.int64())
    found, wanted = stored_rows(out), stored_rows(undisturbed)
    assert found.keys() == wanted.keys()
    for folder, table in wanted.items():
        kept = pc.invert(pc.is_in(table["ordinal"], value_set=given_up))
        assert found[folder].combine_chunks().equals(table.filter(kept).combine_chunks()), folder


def quarantined(out: Path) -> list[int]:
    """The ordinals of prompts that were given up on."""
    return sorted(row["ordinal"] for path in (out / "_quarantine").rglob("*.parquet")
                  for row in pq.read_table(path).to_pylist())


def assert_whole(out: Path, prompts: int, given_up: int = 0) -> Report:
    """Every prompt exactly once, and every file as its record says."""
    report = verify(LocalRoot(out))
    assert report.clean, report
    assert (report.traces, report.quarantined, report.missing_prompts, report.doubled_prompts) == (
        prompts - given_up, given_up, 0, 0), report
    return report


def job_file(folder: Path, name: str = "job.yaml", **fields: object) -> Path:
    """A job of the fake target over `c.jsonl` in the same folder, with these fields over it. JSON is YAML."""
    plain = {"target": "fake", "corpus": str(folder / "c.jsonl"), "out": str(folder / "out"),
             "sampling": {"max_tokens": 8}, "prompts_per_shard": 4} | fields
    path = folder / name
    path.write_text(json.dumps(plain))
    return path
