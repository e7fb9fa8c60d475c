"""Catches an experiment that compares the wrong trainings, forgets what it has done, or reports what was not measured.

Everything runs as in `make proof`, on the bigram target of tiny_drafts and for seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tiny_drafts import SHAPE, TableTarget, sample_text, write_bigrams, write_target

from distill_pipe.consume import ShardReader
from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.speculative.bench import BenchPrompt, BenchSettings, DraftBench, count_accepted
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.verify import verify
from jobs.proof import data
from jobs.proof.data import bench_prompts, conversation, keep_responses, recode, training_prompts, write_text
from jobs.proof.one import Result, run_training
from jobs.proof.plan import MAIN, RECODED, RENORMALISED, SEEDS, Scale, Training, trainings
from jobs.proof.report import by_seed, gains, mean_alpha, shown, tau, write_report

SCALE = Scale(rows=2000, steps=25, batch_tokens=256, lr=1e-2, draft_vocab=24, positions=3, holdout_every=10,
              bench_prompts=30, bench_tokens=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets of the experiment, as far as they can be made without an engine."""
    path = tmp_path_factory.mktemp("proof")
    for name in (MAIN, "k64", "decoded-t0", "decoded-t1"):
        write_bigrams(path / name, 100, tokens=(30, 45))
    for name, codec in RECODED.items():
        recode(path / MAIN, path / name, codec)
    recode(path / "k64", path / RENORMALISED, "bf16-split", renormalised=True)
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def decode(draft: Draft, scale: Scale) -> DraftBench:
    random = np.random.default_rng(9)
    texts = [tuple(sample_text(random, 4)) for _ in range(scale.bench_prompts)]
    prompts = [BenchPrompt(("general", "code")[i % 2], text) for i, text in enumerate(texts)]
    settings = BenchSettings(max_tokens=scale.bench_tokens)
    return count_accepted(TableTarget(), draft, prompts, settings, "bigrams", frozenset())


@pytest.fixture(scope="module")
def results(folder: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some trainings of every table, those of the grid with two seeds."""
    path = tmp_path_factory.mktemp("results")
    wanted = {("grid", "eagle3", "kl"), ("grid", "eagle3", "lk-hybrid"), ("grid", "medusa", "kl"),
              ("grid", "medusa", "lk-hybrid"), ("ladder", "eagle3", "eta=1"),
              ("ablation", "eagle3", "K=64 renormalised"), ("ablation", "eagle3", "K=32+8 q6")}
    for training in trainings():
        if (training.part, training.arch, training.label) in wanted and training.seed < 1 + (training.part == "grid"):
            run_training(training, folder, path, SCALE, target, decode)
    return path


def load(results: Path) -> list[Result]:
    return [msgspec.json.decode(p.read_bytes(), type=Result) for p in sorted(results.glob("*.json"))]


def test_the_experiment_is_the_papers_and_every_training_has_a_file_of_its_own() -> None:
    everything = trainings()
    assert len({t.name for t in everything}) == len(everything) == 3 * (4 * 4 + 4 + 8)
    assert all(set(t.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")
               for t in everything)
    assert {t.seed for t in everything} == set(SEEDS)
    # A seed is complete before the next one starts, so an early stop leaves a whole table.
    assert [t.seed for t in everything] == sorted(t.seed for t in everything)
    paper = next(t for t in everything if t.name == "grid-medusa-lk-hybrid-seed0").settings(Scale())
    assert (paper.positions, paper.objective.gamma, paper.objective.eta, paper.steps) == (6, 0.8, None, 600)


def test_recoded_datasets_are_whole_and_hold_the_same_traces(folder: Path) -> None:
    main = next(iter(ShardReader(folder / MAIN, layers=SHAPE.layers, batch_tokens=500)))
    errors = {}
    for name in RECODED:
        assert verify(LocalRoot(folder / name)).clean
        other = next(iter(ShardReader(folder / name, layers=SHAPE.layers, batch_tokens=500)))
        assert torch.equal(main.token_ids_T, other.token_ids_T)
        assert torch.equal(main.target.topk_logprobs_RK, other.target.topk_logprobs_RK)
        errors[name] = ((main.hidden[1] - other.hidden[1].float()).norm() / main.hidden[1].norm()).item()
    assert 0 < errors["k32-8-q8"] < errors["k32-8-q6"] < errors["k32-8-q5"] < 0.12


def test_a_renormalised_head_has_no_tail_and_the_proportions_of_the_stored_one(folder: Path) -> None:
    assert verify(LocalRoot(folder / RENORMALISED)).clean
    stored, scaled = (next(iter(ShardReader(folder / name, batch_tokens=500))).target for name in ("k64", RENORMALISED))
    assert (scaled.tail_mass_R == 0).all()
    assert torch.allclose(scaled.topk_logprobs_RK.exp().sum(1), torch.ones(len(scaled)), atol=1e-4)
    shift_RK = scaled.topk_logprobs_RK - stored.topk_logprobs_RK
    assert torch.allclose(shift_RK, shift_RK[:, :1].expand_as(shift_RK), atol=1e-3)
    assert torch.allclose(shift_RK[:, 0], -(1 - stored.tail_mass_R).log(), atol=1e-3)


def test_a_recoding_that_stopped_goes_on(folder: Path, tmp_path: Path) -> None:
    recode(folder / MAIN, tmp_path / "part", "q8")
    shards = sorted((tmp_path / "part" / "data").rglob("*.parquet"))
    shards[1].unlink()
    recode(folder / MAIN, tmp_path / "part", "q8")
    assert verify(LocalRoot(tmp_path / "part")).clean


def test_what_is_done_is_not_done_again_and_weights_of_one_seed_are_kept(results, folder, target) -> None:
    training = load(results)[0].training
    before = {p: p.stat().st_mtime_ns for p in results.glob("*.json")}

    def fail(draft: Draft, scale: Scale) -> DraftBench:
        raise AssertionError("this was measured before")

    assert run_training(training, folder, results, SCALE, target, fail).training == training
    assert {p: p.stat().st_mtime_ns for p in results.glob("*.json")} == before
    assert {p.name[-1] for p in (folder / "drafts").iterdir()} == {"0"}


def test_tau_predicted_from_shards_is_what_decoding_counts(results: Path) -> None:
    for result in load(results):
        if not result.training.decode:
            continue
        at_one = next(e for e in result.predicted if e.domains[0].temperature == 1)
        predicted = next(length.tau for length in at_one.domains[0].lengths if length.drafted == 3)
        counted = next(c for c in result.decoded.counts if (c.domain, c.temperature) == (None, 1.0))
        error = np.hypot(predicted.error, (counted.high - counted.low) / 3.92)
        assert predicted.mean == pytest.approx(counted.tau, abs=4 * error), result.training.name


def test_the_page_says_what_was_measured_and_no_more(results: Path) -> None:
    page = write_report(results)
    text = page.read_text()
    rows = by_seed(load(results), lambda r: (r.training.arch, r.training.label) if r.training.part == "grid" else None)
    assert f"| eagle3 | lk-hybrid | {shown([mean_alpha(r) for r in rows['eagle3', 'lk-hybrid'].values()])}" in text
    assert "| K=64 renormalised |" in text
    assert "| eta=1 |" in text
    assert "lk-alpha" not in text.split("## Lambda")[0]
    assert page.with_suffix(".svg").read_text().startswith("<?xml")
    gained = gains(rows["medusa", "lk-hybrid"], rows["medusa", "kl"], tau(1.0, 3))
    assert len(gained) == 2


def test_gains_are_paired_by_seed_and_errors_are_those_of_the_mean(results: Path) -> None:
    first, second = load(results)[:2]
    assert gains({0: first, 1: second}, {0: first}, tau(1.0, 3)) == [0]
    assert shown([1.0, 3.0]) == "2.000 ± 1.000"
    assert shown([1.0]) == "1.000 (one seed)"
    assert shown([]) == "-"


def test_an_empty_folder_makes_an_empty_page(tmp_path: Path) -> None:
    assert "No result yet" in write_report(tmp_path).read_text()


def test_results_of_different_scales_are_not_put_in_one_table(results: Path, tmp_path: Path) -> None:
    for path in results.glob("grid-medusa-*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_report(tmp_path)
    other = tmp_path / "grid-medusa-kl-seed1.json"
    found = msgspec.json.decode(other.read_bytes(), type=Result)
    longer = msgspec.structs.replace(found, scale=msgspec.structs.replace(found.scale, steps=1200))
    other.write_bytes(msgspec.json.encode(longer))
    with pytest.raises(SystemExit, match=r"kl-seed0 and grid-medusa-kl-seed1 .*different scales"):
        write_report(tmp_path)


def test_no_prompt_is_both_trained_on_and_decoded() -> None:
    pytest.importorskip("reasoning_gym")
    trained, decoded = training_prompts(600), bench_prompts(20)
    assert 590 < len(trained) <= 600
    assert {p.domain for p in trained} == {p.domain for p in decoded} == {"general", "code", "maths"}
    assert not {p.id for p in trained} & {p.id for p in decoded}


def test_the_list_says_what_is_done(results: Path) -> None:
    line = [sys.executable, "-m", "jobs.proof", "--list", "--results", str(results), "--only", "grid-medusa-*"]
    listed = subprocess.run(line, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert len(listed.splitlines()) == 12
    assert sum(row.startswith("done  ") for row in listed.splitlines()) == 4


def test_a_result_is_json_that_says_what_it_is_of(results: Path) -> None:
    found = json.loads((results / "grid-eagle3-kl-seed1.json").read_text())
    assert found["training"] | {"objective": {}} == msgspec.to_builtins(
        Training(part="grid", label="kl", arch="eagle3", objective=load(results)[0].training.objective, dataset=MAIN,
                 seed=1, decode=True)) | {"objective": {}}
    assert found["scale"]["steps"] == 25


def test_responses_that_were_kept_are_trained_on_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "RESPONSES", tmp_path / "responses.jsonl.zst")
    scale = Scale(rows=1000, max_tokens=100)
    records = [conversation(prompt, f"Answer {i}, with \u00e4 and \n.") for i, prompt in
               enumerate(training_prompts(3 * scale.rows // scale.max_tokens)[:10])]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keep_responses(tmp_path, scale)
    write_text(tmp_path / "again", scale)
    assert [json.loads(line) for line in (tmp_path / "again" / "scored.jsonl").read_text().splitlines()] == records
    assert data._kept_responses(Scale(rows=1000, max_tokens=100, temperature=1.0)) == {}
