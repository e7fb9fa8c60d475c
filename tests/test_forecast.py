"""`plan`: the arithmetic by hand, what is refused, and a real probe.

Shapes: L layers, H hidden size.
"""

import json
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from runs import LONG_PROMPT, PROMPTS, prompt_records, succeed, write_corpus

from distill_pipe.errors import EngineError, StorageFullError, UsageError
from distill_pipe.produce import forecast as forecast_module
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.forecast import forecast
from distill_pipe.produce.job import Job, load_job
from distill_pipe.produce.memory import GIB, Device, Load, Memory, find_device, plan_memory
from distill_pipe.produce.model_config import read_config
from distill_pipe.produce.rates import Cost, Rates, cost_of, require_room
from distill_pipe.produce.sample import Sample, Totals, evenly, fresh_positions
from distill_pipe.produce.targets import Target
from distill_pipe.store.plan import Message, PlannedPrompt
from distill_pipe.store.spec import CaptureSpec, CorpusSpec, EngineSpec, RunSpec, SamplingSpec, TargetSpec

DiskUsage = namedtuple("DiskUsage", "total used free")


def run_spec(prompts: int = 4, max_model_len: int = 24, layers: tuple[int, ...] = (1, 2), dtype: str = "bfloat16",
             num_layers: int = 4, vocab_size: int = 1000) -> RunSpec:
    return RunSpec(
        target=TargetSpec(name="tiny", revision="sha256:0", architecture="TinyForCausalLM", dtype=dtype,
                          vocab_size=vocab_size, hidden_size=16, num_layers=num_layers, tokenizer_sha256="0" * 64),
        corpus=CorpusSpec(files=(), prompts=prompts), responses="target", sampling=SamplingSpec(max_tokens=8),
        capture=CaptureSpec(layers=layers), prompts_per_shard=2,
        engine=EngineSpec(name="none", version="0", max_model_len=max_model_len))


def sample(tokens: list[int], rows: list[int], shared: list[int], unused: int = 0) -> Sample:
    prompts = [PlannedPrompt(i, f"p{i}", None, (Message("user", "hi"),)) for i in range(len(tokens) + unused)]
    return Sample(prompts, tokens, rows, shared)


def tiny_target(folder: Path, spec: RunSpec, config: dict[str, object], tensors: dict[str, object]) -> Target:
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        header = json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return Target(str(folder), None, folder, spec.target, (1,), 4096, 4096, read_config(folder))


def tensor(dtype: str, first: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": [1], "data_offsets": [first, stop]}


def smollm2_job(tmp_path: Path, *settings: str, corpus: Path | None = None, **options: object) -> Job:
    path = corpus or write_corpus(tmp_path / "c.jsonl", prompt_records())
    return load_job(None, settings, {"target": "smollm2-135m", "corpus": [str(path)], "out": str(tmp_path / "out"),
                                     **options})


@pytest.mark.parametrize(("total", "wanted", "picked"), [(10, 3, [1, 5, 8]), (2, 5, [0, 1]), (1, 1, [0]),
                                                         (7, 7, [0, 1, 2, 3, 4, 5, 6])])
def test_a_sample_is_evenly_spaced_and_all_of_a_small_corpus(total: int, wanted: int, picked: list[int]) -> None:
    assert evenly(total, wanted) == picked


def test_totals_follow_the_sample_and_a_response_stops_where_the_context_ends() -> None:
    # Room is 24 - 10 and 24 - 20, so the responses have 8 and 4 tokens; 5 of the second prompt's states came before.
    totals = sample([10, 20], [0, 0], [0, 5]).totals(run_spec(), 8)
    assert totals == Totals(shards=2, trace=4.0, token=2 * 42.0, row=2 * 12.0, fresh=2 * (17.0 + 18.0))
    assert totals.position == 2 * 40.0


def test_a_prefix_out_of_the_compressors_reach_is_stored_again() -> None:
    token_P, shared_P = np.array([11, 11, 11]), np.array([0, 4, 4])
    # A trace of 10 positions is 2 bytes wide per element: beyond 1 MiB the one before it is out of reach.
    assert fresh_positions(token_P, shared_P, hidden_size=52428) == 10 + 6 + 6
    assert fresh_positions(token_P, shared_P, hidden_size=52429) == 30


def test_prompts_that_cannot_be_used_bring_no_tokens() -> None:
    totals = sample([10], [0], [0], unused=1).totals(run_spec(), 8)
    assert (totals.trace, totals.token, totals.row) == (2.0, 2 * 18.0, 2 * 8.0)


def test_given_responses_are_counted_and_none_is_added() -> None:
    totals = sample([10, 20], [6, 7], [0, 0]).totals(replace(run_spec(), responses="corpus", sampling=None), 8)
    assert (totals.token, totals.row) == (2 * 30.0, 2 * 13.0)


def test_bytes_are_rates_times_units() -> None:
    rates = Rates({"ordinal": 2.0, "token_ids": 1.5, "topk_ids": 50.0},
                  {"q6": {1: 10.0, 2: 20.0}, "bf16-split": {1: 30.0, 2: 40.0}}, footer=1000, record=15)
    cost = cost_of(rates, Totals(shards=2, trace=4, token=100, row=40, fresh=48), run_spec(), plan=77)
    assert [(c.column, c.per, c.bytes) for c in cost.columns] == [
        ("ordinal", "trace", 8), ("token_ids", "token", 150), ("topk_ids", "row", 2000)]
    assert [(c.column, c.per, c.bytes) for c in cost.layers] == [("layer_01", "position", 30 * 48),
                                                                 ("layer_02", "position", 40 * 48)]
    main = 8 + 150 + 2000 + 2 * 1000
    assert cost.data == main + 70 * 48
    assert cost.disk == cost.data + 77 + 15 * 40
    assert [(c.codec, c.hidden, c.total) for c in cost.codecs] == [
        ("none", 0, main + 677), ("q6", 30 * 48, main + 677 + 30 * 48), ("bf16-split", 70 * 48, cost.disk)]


def made_cost() -> Cost:
    layers = {codec: {1: size, 2: size} for codec, size in (("bf16-split", 4e7), ("q8", 3e7), ("q5", 1e7))}
    return cost_of(Rates({"ordinal": 1e7}, layers, 0, 0), Totals(1, 10, 20, 5, 10), run_spec(), plan=0)


def test_a_run_with_five_percent_to_spare_is_let_through_and_one_without_is_refused() -> None:
    cost = made_cost()
    assert cost.disk == 900_000_000
    require_room(cost, run_spec(), 1.0, 945_000_000, "out")
    says = (r"about 0\.900 GB .*0\.944 GB free; with --hidden-codec q8 it is 0\.700 GB, each layer less saves "
            r"0\.400 GB, without hidden states it is 0\.100 GB")
    with pytest.raises(StorageFullError, match=says):
        require_room(cost, run_spec(), 1.0, 944_000_000, "out")


def test_where_no_codec_is_small_enough_the_smallest_is_named() -> None:
    with pytest.raises(StorageFullError, match=r"q5 it is 0\.300 GB \(too much as well\)"):
        require_room(made_cost(), run_spec(), 1.0, 200_000_000, "out")


def test_only_the_shards_that_are_left_need_room() -> None:
    require_room(made_cost(), run_spec(), 0.5, 480_000_000, "out")


def test_without_hidden_states_no_codec_is_offered() -> None:
    cost = cost_of(Rates({"ordinal": 1e7}, {"bf16-split": {}, "q8": {}}, 0, 0), Totals(1, 10, 20, 5, 10),
                   run_spec(layers=()), plan=0)
    with pytest.raises(StorageFullError, match="free some room or take fewer prompts"):
        require_room(cost, run_spec(layers=()), 1.0, 1000, "out")


def memory_of(folder: Path, spec: RunSpec, config: dict[str, object], tensors: dict[str, object],
              device: Device, options: EngineOptions | None = None) -> Memory:
    return plan_memory(tiny_target(folder, spec, config, tensors), spec, Load(100.0, 50.0, 8), 1, device,
                       options or EngineOptions())


UNKNOWN = Device(kind="unknown")
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}


def test_the_cache_holds_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    found = memory_of(tmp_path, run_spec(), GROUPED, {"a": tensor("BF16", 0, 64)}, UNKNOWN)
    assert found.kv_per_token == 2 * 4 * 2 * 32 * 2
    assert (found.kv_batch, found.kv_least) == (1024 * 100 * 8, 1024 * 24)


@pytest.mark.parametrize(("tensor_parallel", "copies"), [(1, 1), (2, 1), (8, 4)])
def test_devices_beyond_the_heads_repeat_keys_and_values(tmp_path: Path, tensor_parallel: int, copies: int) -> None:
    options = EngineOptions(tensor_parallel_size=tensor_parallel)
    found = memory_of(tmp_path, run_spec(), GROUPED, {"a": tensor("BF16", 0, 64)}, UNKNOWN, options)
    assert (found.devices_per_engine, found.kv_per_token) == (tensor_parallel, copies * 2 * 4 * 2 * 32 * 2)


def test_a_target_too_large_for_one_device_fits_on_four(tmp_path: Path) -> None:
    device, weights = Device(kind="gpu", bytes=GIB, source="given"), {"a": tensor("BF16", 0, 2 * GIB)}
    for name in ("one", "two", "four"):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="does not fit"):
        memory_of(tmp_path / "one", run_spec(), GROUPED, weights, device)
    with pytest.raises(UsageError, match=r"GiB on each of 2 devices \(given\)"):
        memory_of(tmp_path / "two", run_spec(), GROUPED, weights, device, EngineOptions(tensor_parallel_size=2))
    found = memory_of(tmp_path / "four", run_spec(), GROUPED, weights, device,
                      EngineOptions(tensor_parallel_size=2, pipeline_parallel_size=2))
    assert found.fitting_sequences is not None
    assert found.fitting_sequences > 0


def test_latent_attention_keeps_one_vector_per_layer(tmp_path: Path) -> None:
    config: dict[str, object] = {"text_config": {"num_attention_heads": 8, "kv_lora_rank": 512, "qk_rope_head_dim": 64}}
    assert memory_of(tmp_path, run_spec(), config, {"a": tensor("BF16", 0, 64)}, UNKNOWN).kv_per_token == 4 * 576 * 2


def test_weights_count_in_the_dtype_of_the_run_and_quantised_ones_as_they_are(tmp_path: Path) -> None:
    tensors = {"a": tensor("BF16", 0, 200), "b": tensor("F32", 200, 1000), "c": tensor("I8", 1000, 1300)}
    found = memory_of(tmp_path, run_spec(dtype="float32"), GROUPED, tensors, UNKNOWN)
    assert found.weights == 400 + 800 + 300


def test_weights_of_a_hub_model_come_from_its_index_or_from_its_config(tmp_path: Path) -> None:
    config = GROUPED | {"intermediate_size": 64, "tie_word_embeddings": True, "dtype": "float32"}
    by_hand = 1000 * 16 + 4 * (2 * 16 * 32 * (8 + 2) + 3 * 16 * 64)
    assert memory_of(tmp_path, run_spec(), config, {}, UNKNOWN).weights == by_hand * 2
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 1000}, "weight_map": {}}')
    assert memory_of(tmp_path, run_spec(), config, {}, UNKNOWN).weights == 500


def test_capture_holds_a_chunk_of_logits_and_the_states_of_a_step(tmp_path: Path) -> None:
    found = memory_of(tmp_path, run_spec(), GROUPED, {"a": tensor("BF16", 0, 64)}, Device(kind="gpu", bytes=80 * GIB))
    assert found.capture == 256 * 1000 * (2 * 4 + 2) + 16384 * 2 * 16 * (2 + 2 + 2)


def test_a_target_larger_than_its_gpu_is_refused_with_the_numbers(tmp_path: Path) -> None:
    large = {"a": tensor("BF16", 0, 75 * GIB)}
    with pytest.raises(UsageError, match=r"tiny does not fit: 75\.00 GiB of bfloat16 weights, .* leave 0\.00 GiB of "
                                         r"92% of 80\.00 GiB \(--gpu-memory\).*larger device"):
        memory_of(tmp_path, run_spec(), GROUPED, large, find_device(80, None))
    assert memory_of(tmp_path, run_spec(), GROUPED, large, find_device(96, None)).fitting_sequences


def test_a_context_that_the_cache_cannot_hold_is_refused_with_the_fix(tmp_path: Path) -> None:
    spec, says = run_spec(max_model_len=2_000_000), r"2000000 tokens needs 1\.91 GiB of KV cache; lower max_model_len"
    with pytest.raises(UsageError, match=says):
        memory_of(tmp_path, spec, GROUPED, {"a": tensor("BF16", 0, GIB)}, find_device(2, None))


def test_the_sequences_that_fit_are_what_is_left_over(tmp_path: Path) -> None:
    # 0.92 * 10 GiB less 1 GiB of weights, at 1024 bytes for each of 100 tokens; capture stays within the other 8 %.
    found = memory_of(tmp_path, run_spec(), GROUPED, {"a": tensor("BF16", 0, GIB)}, find_device(10, None))
    assert found.fitting_sequences == int((int(10 * GIB * 0.92) - GIB) / 102400)


def test_the_memory_of_another_machine_is_not_guessed() -> None:
    assert find_device(None, "ray://head:10001") == Device(kind="unknown")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the free bytes of every disk."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**15, 0, free))


def test_a_full_disk_refuses_a_job_and_nothing_is_written(tmp_path: Path, disk: Callable[[int], None]) -> None:
    disk(100_000)
    with pytest.raises(StorageFullError, match=r"out: about 0\.00\d GB will be written .* with --hidden-codec"):
        forecast(smollm2_job(tmp_path, "sampling.max_tokens=48"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_only_the_expected_length_is_refused_and_the_longest_is_warned_of(tmp_path: Path,
                                                                         disk: Callable[[int], None]) -> None:
    job = smollm2_job(tmp_path, "sampling.max_tokens=256")
    roomy = forecast(job)
    assert not [note for note in roomy.notes if note.startswith("WARNING")]
    disk(int(roomy.disk_bytes * 1.06))
    assert any("should every response reach max_tokens" in note for note in forecast(job).notes)


def test_without_an_engine_a_plan_has_no_fingerprint_and_all_else(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    job = smollm2_job(tmp_path)
    known = forecast(job)

    def missing(_: int) -> EngineSpec:
        raise EngineError("vLLM is not installed")

    monkeypatch.setattr(forecast_module, "vllm_spec", missing)
    unknown = forecast(job)
    assert known.fingerprint is not None
    assert unknown.fingerprint is None
    assert (unknown.tokens, unknown.bytes) == (known.tokens, known.bytes)


def test_given_responses_are_measured_and_not_assumed(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"prompt": "Count.", "completion": "One, two, three."},
                                        {"prompt": "Again.", "completion": "One."}]
    found = forecast(smollm2_job(tmp_path, corpus=write_corpus(tmp_path / "c.jsonl", records), responses="corpus"))
    # Words, signs, and the token that closes a turn.
    assert (found.rows, found.response_tokens_from) == (7 + 3, "the corpus")
    assert found.disk_bytes == found.disk_bytes_longest


def test_prompts_over_the_context_length_are_counted_and_cost_nothing(tmp_path: Path) -> None:
    both = write_corpus(tmp_path / "both.jsonl", prompt_records((*PROMPTS, LONG_PROMPT)))
    short = write_corpus(tmp_path / "short.jsonl", prompt_records())
    with_long, without = (forecast(smollm2_job(tmp_path, "max_model_len=128", corpus=path)) for path in (both, short))
    assert (with_long.prompts_too_long, without.prompts_too_long) == (1, 0)
    assert with_long.tokens == without.tokens


def test_a_corpus_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    long = write_corpus(tmp_path / "long.jsonl", prompt_records((LONG_PROMPT,)))
    with pytest.raises(UsageError, match=r"none of 1 prompts can be used: 1 are over the context length of 128"):
        forecast(smollm2_job(tmp_path, "max_model_len=128", corpus=long))


def test_a_system_prompt_that_every_prompt_begins_with_is_cheap(tmp_path: Path) -> None:
    words = "You answer in the style of a careful librarian. " * 20
    records = [{"messages": [{"role": "system", "content": f"{i} {words}" if apart else words},
                             {"role": "user", "content": p}]} for apart in (True, False) for i, p in enumerate(PROMPTS)]
    corpora = [write_corpus(tmp_path / name, some) for name, some in (("apart.jsonl", records[:len(PROMPTS)]),
                                                                      ("alike.jsonl", records[len(PROMPTS):]))]
    apart, alike = (forecast(smollm2_job(tmp_path, "sampling.max_tokens=2", corpus=path)) for path in corpora)
    assert alike.tokens < apart.tokens < 1.05 * alike.tokens
    assert alike.bytes < 0.5 * apart.bytes


@pytest.mark.engine
def test_a_probe_measures_what_it_ran_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("distill-pipe-*"))
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records())
    line = ("--target", "smollm2-135m", "--corpus", corpus, "--out", tmp_path / "out", "--layers", "2,30",
            "--hidden-codec", "q6", "--set", "sampling.max_tokens=24")
    found = json.loads(succeed("plan", *line, "--probe", len(PROMPTS), "--json").stdout)
    assert not (tmp_path / "out").exists()
    assert set(Path(tempfile.gettempdir()).glob("distill-pipe-*")) <= before
    assert found["probe"]["prompts"] == found["probe"]["traces"] == len(PROMPTS)
    assert found["probe"]["response_tokens"][-1] <= 24
    assert found["probe"]["tokens_per_second"] > 0
    assert (found["tokens"], found["rows"]) == (found["probe"]["tokens"], found["probe"]["rows"])
    sizes = {c["codec"]: c["hidden"] for c in found["codecs"]}
    assert 0 == sizes["none"] < sizes["q5"] < sizes["q6"] < sizes["q8"] < sizes["bf16-split"] < sizes["f32"]
    succeed("generate", *line)
    written = json.loads(succeed("status", tmp_path / "out", "--json").stdout)
    # The probe was the whole corpus: same prompts, same seeds, same shard.
    assert found["tokens"] == written["tokens"]
    assert found["bytes"] == pytest.approx(written["bytes"], rel=0.01)
    assert json.loads(succeed("plan", *line, "--json").stdout)["shards_left"] == 0
