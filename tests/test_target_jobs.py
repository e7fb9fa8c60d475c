"""Catches a job file of `jobs/targets/` that is no job, or that cannot run on the GPUs it names."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from msgspec.structs import replace
from runs import prompt_records, write_corpus

from distill_pipe.produce.corpus import sources
from distill_pipe.produce.forecast import forecast
from distill_pipe.produce.job import load_job

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs" / "targets").glob("*.yaml"))
PAPER = ("llama-3.1-8b", "llama-3.3-70b", "gpt-oss-20b", "gpt-oss-120b", "qwen3-235b", "deepseek-v3")
ANSWERED = {"id": "x", "conversation": [{"role": "user", "content": "Name a colour."}],
            "generated_message": {"role": "assistant", "content": "Blue, like the sea."}, "finish_reason": "stop"}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_pipe.produce.targets._reachable", lambda *_: False)


def test_every_target_of_the_paper_has_a_job_for_its_corpus() -> None:
    assert {path.stem for path in JOBS} >= {f"{name}-infinity" for name in PAPER}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_is_planned_on_the_gpus_it_names(path: Path, tmp_path: Path) -> None:
    schema = json.loads((ROOT / "schemas" / "job.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    job = load_job(path, [], {})
    assert path.stem.startswith(job.target)
    records = prompt_records() if job.responses == "target" else [ANSWERED] * 3
    corpus = write_corpus(tmp_path / "c.jsonl", records)
    found = forecast(replace(job, corpus=str(corpus), out=str(tmp_path / "out")))
    assert found.layers == ((61,) if job.target == "deepseek-v3" else (2, found.layers[1], *found.layers[2:]))
    assert len(found.layers) == (1 if job.target == "deepseek-v3" else 4)
    assert found.memory.fitting_sequences
    assert found.memory.fitting_sequences >= job.engine.max_num_seqs
    assert job.workers * job.engine.devices == 8
    assert found.rows > 0
    assert found.throughput is not None


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_corpus_of_a_job_file_is_known_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("distill_pipe.produce.corpus.find_sources", lambda address: asked.append(address) or [])
    sources(load_job(path, [], {}).corpus_files)
    assert len(asked) == 1
    assert asked[0].startswith("hf://datasets/")
