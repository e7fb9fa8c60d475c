"""Catches an audit that passes wrong rows, blames what rounding or a codec did, or compares with the wrong model.

The target of most tests is a tiny model of transformers with random weights; its rows are made in float64, by its own
plain forward pass. Shapes: T tokens, R rows, C rows of a chunk, N flat entries, V vocabulary, H hidden size.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from runs import stored_traces
from tiny_datasets import Shape, commit_traces, start_run, trace_from_logits

from distill_pipe.cli import main
from distill_pipe.consume import ShardReader
from distill_pipe.consume.losses import tv_loss
from distill_pipe.errors import DamageError, MismatchError, UsageError
from distill_pipe.produce import audit, replay
from distill_pipe.produce.audit import Limits, audit_dataset, pick_traces
from distill_pipe.produce.comparison import AuditReport, Comparison, alpha_drift, half_unit
from distill_pipe.produce.replay import Replayer, replayed_rows
from distill_pipe.produce.targets import resolve_target
from distill_pipe.store.codec import HiddenBlob, round_significant
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import RUN, Run, encode_record, read_fragment, require_run, shard_name
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt, read_main, write_main
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.trace import Trace

transformers = pytest.importorskip("transformers")

SHAPE = Shape(vocab_size=96, hidden_size=32, num_layers=3, layers=(0, 1, 2, 3), hidden_codec="f32")
COLUMNS = ["topk_logprobs", "tail_logprobs", "next_logprob", "logsumexp", "tail_mass"]
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
         "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}
# The last two change their logits after the head; Gemma also scales its embeddings.
MODELS = {"llama": ("LlamaConfig", {}), "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
          "granite": ("GraniteConfig", {"logits_scaling": 0.25, "embedding_multiplier": 3.0}),
          "gemma2": ("Gemma2Config", {"final_logit_softcapping": 2.0, "sliding_window": 4})}


@dataclass(frozen=True)
class Tiny:
    """A model on disk, and its traces of float64 as yet unwritten."""

    folder: Path
    traces: tuple[Trace, ...]

    def dataset(self, path: Path, traces: Sequence[Trace] | None = None, shape: Shape = SHAPE, **target: str) -> Path:
        """Commit traces (these, when not given) as a dataset of this model."""
        held = [replace(t, hidden={n: t.hidden[n].copy() for n in shape.layers}) for t in traces or self.traces]
        commit_traces(path, self.start(path, len(held), shape, **target), held)
        return path

    def start(self, path: Path, num_prompts: int, shape: Shape = SHAPE, **target: str) -> Run:
        run = start_run(path, num_prompts, shape)
        found = msgspec.structs.replace(resolve_target(str(self.folder)).spec, name=str(self.folder))
        spec = msgspec.structs.replace(run.spec, target=msgspec.structs.replace(found, **target))
        run = msgspec.structs.replace(run, spec=spec, fingerprint=spec.fingerprint)
        (path / RUN).write_bytes(encode_record(run))
        return run


def save_model(folder: Path, config: object, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def exact_traces(model: torch.nn.Module, num_traces: int) -> Iterator[Trace]:
    model.double()
    random = np.random.default_rng(0)
    for ordinal in range(num_traces):
        tokens_T = random.integers(0, 96, random.integers(6, 20)).astype(np.int32)
        mask_T = np.arange(len(tokens_T)) >= 1 + ordinal % 3
        before: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _m, args, before=before: before.append(args[0]))
        with torch.no_grad():
            out = model(torch.from_numpy(tokens_T.astype(np.int64))[None], output_hidden_states=True)
        hook.remove()
        states = (*out.hidden_states[:3], before[0])
        hidden = {n: state[0, :-1].float().numpy() for n, state in enumerate(states)}
        yield trace_from_logits(ordinal, tokens_T, mask_T, out.logits[0].float().numpy(), hidden, SHAPE)
    model.float()


def make_tiny(folder: Path, name: str, num_traces: int = 10) -> Tiny:
    config, extra = MODELS[name]
    model = save_model(folder, getattr(transformers, config)(**SIZES | extra))
    return Tiny(folder, tuple(exact_traces(model, num_traces)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call `distill-pipe audit` in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["distill-pipe", "audit", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return call


def by_column(report: AuditReport) -> dict[str, float]:
    return {n.column: n.beyond_mean for n in report.numbers}


@pytest.mark.parametrize("name", MODELS)
def test_rows_and_states_of_a_plain_float64_forward_pass_are_found_exact(tmp_path, monkeypatch, name) -> None:
    model = make_tiny(tmp_path / "model", name, 6)
    # Chunks of three rows; the longest trace needs several.
    monkeypatch.setattr(replay, "CHUNK_BYTES", 3 * 4 * 96)
    report = audit_dataset(LocalRoot(model.dataset(tmp_path / "out")), 100)
    assert report.exceeded == ()
    assert (report.ordinals, report.rows) == (tuple(range(6)), sum(t.num_rows for t in model.traces))
    assert [n.column for n in report.numbers] == COLUMNS
    assert [n.entries for n in report.numbers] == [8 * report.rows, 4 * report.rows, *[report.rows] * 3]
    assert max(n.max for n in report.numbers) < 2e-4
    assert [e.layer for e in report.layers] == [0, 1, 2, 3]
    assert max(e.max for e in report.layers) < 1e-5
    assert {e.positions for e in report.layers} == {sum(t.num_tokens - 1 for t in model.traces)}
    assert (report.top1_agreement, report.top1_ties, report.revision_checked) == (1, 0, True)
    assert report.alpha_drift_max < 1e-4
    assert report.nonfinite_rows == report.nonfinite_states == report.nonfinite_differences == 0


def test_the_chunks_of_logits_stay_under_their_bytes(tiny, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(replay, "CHUNK_BYTES", 3 * 4 * 96)
    seen = []

    def watched(logits_CV: torch.Tensor, trace: Trace, first: int) -> object:
        seen.append((trace.ordinal, first, len(logits_CV)))
        return replayed_rows(logits_CV, trace, first)

    monkeypatch.setattr(replay, "replayed_rows", watched)
    audit_dataset(LocalRoot(tiny.dataset(tmp_path / "out")), 100)
    assert max(size for _, _, size in seen) == 3
    for trace in tiny.traces:
        starts = [first for ordinal, first, _ in seen if ordinal == trace.ordinal]
        assert starts == list(range(0, trace.num_rows, 3))
        assert sum(size for ordinal, _, size in seen if ordinal == trace.ordinal) == trace.num_rows


def shift_rows(trace: Trace) -> Trace:
    """Each row holds what belongs to the row before it; the first is doubled."""
    rows_R = np.maximum(np.arange(trace.num_rows) - 1, 0)
    columns: dict[str, np.ndarray] = {name: getattr(trace, name)[rows_R]
                                      for name in ("logsumexp_R", "tail_mass_R", "next_logprob_R", "topk_counts_R",
                                                   "tail_counts_R")}
    for part in ("topk", "tail"):
        ends = getattr(trace, f"{part}_counts_R").cumsum()
        starts = ends - getattr(trace, f"{part}_counts_R")
        picked_N = np.concatenate([np.arange(starts[r], ends[r]) for r in rows_R]).astype(np.int64)
        columns |= {f"{part}_{what}_N": getattr(trace, f"{part}_{what}_N")[picked_N] for what in ("ids", "logprobs")}
    return replace(trace, **columns)


def change_states(change: Callable[[dict[int, np.ndarray]], dict[int, np.ndarray]]) -> Callable[[Trace], Trace]:
    return lambda trace: replace(trace, hidden=trace.hidden | change(trace.hidden))


# What was done to every trace, and what alone the audit may complain about.
TAMPERED: dict[str, tuple[Callable[[Trace], Trace], set[str]]] = {
    "rows are off by one": (shift_rows, set(COLUMNS)),
    "states are off by one": (change_states(lambda h: {2: np.roll(h[2], 1, axis=0)}), {"layer 2"}),
    "layers are numbered from one": (change_states(lambda h: {1: h[2], 2: h[3]}), {"layer 1", "layer 2"}),
    "the last state is behind the norm": (
        change_states(lambda h: {3: h[3] / np.sqrt((h[3] ** 2).mean(1, keepdims=True))}), {"layer 3"}),
    "a temperature was applied": (lambda t: replace(t, topk_logprobs_N=t.topk_logprobs_N / 1.02), {"topk_logprobs"}),
    "samples belong to other tokens": (lambda t: replace(t, tail_ids_N=np.roll(t.tail_ids_N, 1)), {"tail_logprobs"}),
    "the next token is another one": (lambda t: replace(t, next_logprob_R=t.next_logprob_R - 0.002), {"next_logprob"}),
    "logits have an offset": (lambda t: replace(t, logsumexp_R=t.logsumexp_R + 0.002), {"logsumexp"}),
    "the tail is too light": (lambda t: replace(t, tail_mass_R=t.tail_mass_R * 0.98), {"tail_mass"}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_dataset_that_is_whole_but_wrong_is_found_and_the_error_named(tiny, tmp_path, cli, what) -> None:
    change, named = TAMPERED[what]
    root = tiny.dataset(tmp_path / "out", [change(t) for t in tiny.traces])
    report = audit_dataset(LocalRoot(root), 5)
    assert {line.partition(" is off by")[0] for line in report.exceeded} == named
    code, out, err = cli(root, "--traces", 5)
    assert code == 8
    assert all(column in out for column in COLUMNS)
    assert err.splitlines()[0] == "replaying 5 traces in float32"
    assert err.splitlines()[1:] == [f"error: {root}: {'; '.join(report.exceeded)}"]


def test_rounding_and_the_codec_are_not_held_against_the_engine(tiny, tmp_path) -> None:
    shape = replace(SHAPE, logprob_bits=7, hidden_codec="q6")
    root = tiny.dataset(tmp_path / "out", shape=shape)
    report = audit_dataset(LocalRoot(root), 100)
    assert report.exceeded == ()
    for number in report.numbers:
        assert number.mean <= number.rounding + 1e-6, number
        assert number.beyond_max < 2e-5, number
    assert report.numbers[0].mean > 3 * report.max_logprob_error
    # Scalars are stored with eight bits more.
    assert max(n.rounding for n in report.numbers[2:]) < 1e-3 < min(n.rounding for n in report.numbers[:2])
    for layer in report.layers:
        assert layer.mean > 10 * report.max_hidden_error
        assert layer.mean == pytest.approx(layer.codec_mean, rel=0.05)
        assert layer.codec_max == max(e.max for s in range(3) for f in [read_fragment(LocalRoot(root), s)] if f
                                      for e in f.info.measured.hidden if e.layer == layer.layer)


@pytest.mark.parametrize("bits", [3, 7, 15, 24])
def test_half_a_unit_is_the_most_that_rounding_moves_a_number(bits) -> None:
    exact = -np.exp(np.random.default_rng(0).uniform(-12, 4, 20_000)).astype(np.float32)
    stored = round_significant(exact, bits).astype(np.float64)
    share = np.abs(stored - exact) / half_unit(stored, bits)
    assert share.max() <= 1
    assert share.max() > 0.99 or bits == 24


def test_limits_given_by_hand_replace_those_of_the_dtype(tiny, tmp_path) -> None:
    root = LocalRoot(tiny.dataset(tmp_path / "out"))
    rough = audit_dataset(root, 3, "bfloat16")
    assert (rough.max_logprob_error, rough.max_hidden_error) == audit.NOISE["bfloat16"]
    assert min(e.mean for e in rough.layers[1:]) > 1e-3
    assert by_column(rough)["topk_logprobs"] > 1e-3
    strict = audit_dataset(root, 3, "bfloat16", limits=Limits(logprob=1e-3, hidden=1e-3))
    assert {line.partition(" is off by")[0] for line in strict.exceeded} >= {"topk_logprobs", "layer 1", "layer 3"}
    assert audit_dataset(root, 3, limits=Limits(logprob=math.nan)).exceeded
    engine = tiny.dataset(tmp_path / "bf16", dtype="bfloat16")
    assert audit_dataset(LocalRoot(engine), 3).max_logprob_error == audit.NOISE["bfloat16"][0]


@pytest.mark.parametrize("tail_samples", [4, 0])
def test_alpha_drift_is_that_of_the_losses(tiny, tmp_path, tail_samples) -> None:
    """The stored rows against another model's logits, as the trainer would compare them."""
    shape = replace(SHAPE, tail_samples=tail_samples, logprob_bits=7)
    traces = tiny.traces if tail_samples else [
        replace(t, tail_counts_R=t.tail_counts_R * 0, tail_ids_N=t.tail_ids_N[:0], tail_logprobs_N=t.tail_logprobs_N[:0]
                ) for t in tiny.traces]
    root = tiny.dataset(tmp_path / "out", traces, shape)
    random = np.random.default_rng(3)
    for batch, trace in zip(ordered_batches(root), stored_traces(root), strict=True):
        logits_RV = torch.from_numpy(random.normal(0, 2, (trace.num_rows, 96)).astype(np.float32))
        drift_R = alpha_drift(trace, replayed_rows(logits_RV, trace, 0))
        wanted = tv_loss(logits_RV, batch.target, tail="sampled" if tail_samples else "bucket")
        np.testing.assert_allclose(drift_R, 1 - wanted.alpha_R.numpy(), atol=2e-6)
        assert drift_R.mean() > 0.2


def ordered_batches(root: Path) -> list:
    return sorted(ShardReader(root, batch_tokens=1), key=lambda batch: int(batch.ordinals_B[0]))


def test_a_top1_that_differs_by_less_than_noise_is_a_tie_and_no_agreement(tiny) -> None:
    trace = tiny.traces[0]
    logits_RV = torch.zeros(trace.num_rows, 96)
    rows, first_R = torch.arange(trace.num_rows), trace.topk_ids_N[np.cumsum(trace.topk_counts_R) - 8].astype(np.int64)
    logits_RV[rows, torch.from_numpy(first_R)] = 5.0
    other_R = torch.from_numpy((first_R + 1) % 96)
    logits_RV[0, other_R[0]], logits_RV[1, other_R[1]], logits_RV[2, other_R[2]] = 5.0005, 5.1, 5.0
    compared = Comparison(logprob_bits=24, tie=1e-3)
    compared.add_rows(trace, replayed_rows(logits_RV, trace, 0))
    assert (compared.rows, compared.agreed, compared.ties) == (trace.num_rows, trace.num_rows - 2, 1)


def test_a_replay_that_is_not_finite_never_passes(tiny) -> None:
    trace = tiny.traces[0]
    logits_RV = torch.zeros(trace.num_rows, 96)
    logits_RV[1] = math.nan
    compared = Comparison(logprob_bits=24, tie=1e-3)
    compared.add_rows(trace, replayed_rows(logits_RV, trace, 0))
    # One row: its 8 head entries, 4 samples, 3 scalars, and its alpha.
    assert compared.nonfinite_differences == 16
    assert compared.rows == trace.num_rows
    assert all(math.isfinite(t.error.mean) for t in compared.numbers.values())


def commit_with_nan_states(tiny: Tiny, path: Path) -> Path:
    run, root = tiny.start(path, 4), LocalRoot(path)
    held = []
    for trace in tiny.traces[:4]:
        one = encode_trace(replace(trace, hidden={n: h.copy() for n, h in trace.hidden.items()}), "f32")
        states_TH = np.frombuffer(one.blobs[2].data, np.float32).copy().reshape(-1, 32)
        states_TH[1, :3], states_TH[2, 0] = np.nan, np.inf
        held.append(EncodedTrace(one.trace, one.blobs | {2: HiddenBlob(states_TH.tobytes())}, one.errors))
    commit_shard(root, run, 0, held, [])
    return path


def test_states_that_are_not_finite_are_counted_and_the_others_still_compared(tiny, tmp_path, cli) -> None:
    root = commit_with_nan_states(tiny, tmp_path / "out")
    code, out, err = cli(root, "--traces", 2, "--json")
    report = msgspec.json.decode(out, type=AuditReport)
    assert code == 8
    assert report.nonfinite_states == 8
    assert report.layers[2].positions == report.layers[1].positions - 4
    assert report.layers[2].max < 1e-5
    assert report.exceeded == ("8 values of states are not finite",)
    assert err.endswith("8 values of states are not finite\n")


def test_rows_that_are_not_finite_are_counted_and_their_trace_is_left_out(tiny, tmp_path) -> None:
    root = LocalRoot(tiny.dataset(tmp_path / "out", tiny.traces[:4]))
    fragment = read_fragment(root, 0)
    assert fragment is not None
    path = root.local(shard_name(0))
    table = read_main(path, fragment.info, require_run(root).spec.capture)
    rows = table.to_pylist()
    rows[1]["tail_logprobs"][2], rows[1]["logsumexp"][0] = math.nan, math.inf
    path.unlink()
    write_main(path, type(table).from_pylist(rows, schema=table.schema), fragment.info)
    report = audit_dataset(root, 4)
    assert (report.ordinals, report.nonfinite_rows) == ((0, 2, 3), 2)
    assert report.exceeded == ("2 values of rows are not finite",)


@pytest.mark.parametrize("counts", [[10], [4, 4, 1], [0, 3, 0, 7, 0], [1] * 20, [100, 1, 100]])
@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 1000])
def test_traces_are_picked_at_equal_distances_over_the_whole_dataset(counts, wanted) -> None:
    picked = pick_traces(dict(enumerate(counts)), wanted)
    starts = np.cumsum([0, *counts])
    flat = [int(starts[shard]) + row for shard, rows in picked.items() for row in rows]
    assert all(0 <= row < counts[shard] for shard, rows in picked.items() for row in rows)
    total, found = sum(counts), min(wanted, sum(counts))
    assert len(set(flat)) == len(flat) == found
    assert flat == sorted(flat)
    gaps = np.diff([-(total - flat[-1]), *flat])
    assert gaps.max() - gaps.min() <= 1
    assert picked == pick_traces(dict(enumerate(counts)), wanted)


def test_no_trace_can_be_picked_from_nothing() -> None:
    assert pick_traces({}, 3) == pick_traces({0: 0, 1: 0}, 3) == {}


def test_only_the_shards_that_hold_picked_traces_are_read(tiny, tmp_path) -> None:
    root = LocalRoot(tiny.dataset(tmp_path / "out"))
    assert num_shards(require_run(root)) == 3
    root.local(shard_name(0)).write_bytes(b"no parquet")
    assert audit_dataset(root, 1).ordinals == (5,)
    with pytest.raises(DamageError, match="shard-0000000"):
        audit_dataset(root, 3)


def test_another_model_is_refused_with_what_differs(tiny, tmp_path, cli) -> None:
    root = tiny.dataset(tmp_path / "out")
    config = transformers.LlamaConfig(**SIZES)
    save_model(tmp_path / "retrained", config, seed=1)
    code, out, err = cli(root, "--target", tmp_path / "retrained")
    assert (code, out) == (4, "")
    assert "is not the target of this dataset: revision is sha256:" in err
    assert len(err.splitlines()) == 1
    save_model(tmp_path / "other", transformers.LlamaConfig(**SIZES | {"vocab_size": 97}))
    (tmp_path / "other" / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(MismatchError, match=r"vocab_size is 97, recorded 96; tokenizer_sha256 is .*; revision is"):
        audit_dataset(LocalRoot(root), 1, target=str(tmp_path / "other"))


def test_a_local_copy_of_a_hub_model_is_accepted_and_the_report_says_that_it_could_not_be_identified(
        tiny, tmp_path, cli) -> None:
    root = tiny.dataset(tmp_path / "out", name="owner/model", revision="c0ffee")
    code, out, _ = cli(root, "--target", tiny.folder)
    assert code == 0
    assert "not identified" in out
    assert "those of the dataset" in cli(tiny.dataset(tmp_path / "local"))[1]
    assert not audit_dataset(LocalRoot(root), 1, target=str(tiny.folder)).revision_checked
    (tmp_path / "copy").mkdir()
    for file in tiny.folder.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(MismatchError, match="tokenizer_sha256"):
        audit_dataset(LocalRoot(root), 1, target=str(tmp_path / "copy"))


def test_bad_input_ends_in_one_line_and_its_code(tiny, tmp_path, cli) -> None:
    tiny.start(tmp_path / "empty", 4)
    quarantined = [QuarantinedPrompt(o, f"prompt-{o}", "too_long", "") for o in range(*shard_range(
        tiny.start(tmp_path / "quarantined", 4), 0))]
    commit_shard(LocalRoot(tmp_path / "quarantined"), require_run(LocalRoot(tmp_path / "quarantined")), 0, [],
                 quarantined)
    whole = tiny.dataset(tmp_path / "whole")
    unnamed = tiny.dataset(tmp_path / "unnamed", name="llama-tiny")
    for line, code, says in (
            ((whole, "--traces", 0), 2, "at least 1 trace"), ((tmp_path / "nowhere",), 4, "it has no run.json"),
            ((tmp_path / "empty",), 2, "has no trace yet"), ((tmp_path / "quarantined",), 2, "has no trace yet"),
            ((unnamed,), 2, "--target says where llama-tiny is"),
            ((whole, "--target", tmp_path), 2, "config.json cannot be read")):
        found, out, err = cli(*line)
        assert (found, out) == (code, ""), err
        assert says in err
        assert len(err.splitlines()) == 1


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_random_ones(tiny, tmp_path, cli) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    root = Tiny(tmp_path, tiny.traces).dataset(tmp_path / "out")
    code, _, err = cli(root)
    assert code == 2
    assert "lacks weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight" in err


def test_a_model_without_a_known_final_norm_is_named_but_its_rows_can_be_audited(tmp_path) -> None:
    config = transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k not in ("head_dim",
                                                                                       "num_key_value_heads")})
    model = save_model(tmp_path, config)
    with pytest.raises(UsageError, match="GPTNeoXForCausalLM has no decoder with 3 `layers` and a final `norm`"):
        Replayer(model, (1,), 3)
    tokens_T = np.arange(10, dtype=np.int32)
    with torch.no_grad():
        logits_TV = model(torch.arange(10)[None]).logits[0].numpy()
    shape = replace(SHAPE, layers=())
    trace = trace_from_logits(0, tokens_T, tokens_T > 3, logits_TV, {}, shape)
    report = audit_dataset(LocalRoot(Tiny(tmp_path, (trace,)).dataset(tmp_path / "out", shape=shape)), 1)
    assert (report.exceeded, report.layers, report.rows) == ((), (), 6)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["generated", "scored"])
def test_what_a_real_float32_engine_stored_passes(name, request, cli) -> None:
    code, out, err = cli(request.getfixturevalue(name), "--traces", 4, "--json")
    assert code == 0, err
    assert set(json.loads(out)) == set(AuditReport.__struct_fields__)
    report = msgspec.json.decode(out, type=AuditReport)
    assert (report.engine_dtype, report.dtype, report.revision_checked, report.exceeded) == (
        "float32", "float32", True, ())
    assert report.rows > 30
    for number in report.numbers:
        assert number.mean <= number.rounding + 2e-4, number
        assert number.beyond_max <= 2e-4, number
    assert [e.layer for e in report.layers] == [0, 2, 15, 30]
    assert max(e.max for e in report.layers) <= 1e-4
    assert report.top1_agreement + report.top1_ties == 1
    assert report.alpha_drift_mean <= 0.01


@pytest.mark.engine
def test_a_real_dataset_whose_rows_were_shifted_ends_in_8_below_its_table(generated, tmp_path, cli) -> None:
    run, root = require_run(LocalRoot(generated)), LocalRoot(tmp_path / "out")
    root.create_bytes(encode_record(run), RUN)
    traces = {t.ordinal: t for t in stored_traces(generated)}
    for shard in range(num_shards(run)):
        ordinals = range(*shard_range(run, shard))
        held = [encode_trace(shift_rows(traces[o]), "f32") for o in ordinals if o in traces]
        gone = [QuarantinedPrompt(o, f"p{o}", "too_long", "") for o in ordinals if o not in traces]
        commit_shard(root, run, shard, held, gone)
    code, out, err = cli(root.path, "--traces", 2)
    assert code == 8
    assert "top-1 agreement" in out
    assert [line[:5] for line in err.splitlines()] == ["repla", "error"]
    assert "topk_logprobs is off by" in err
    assert "layer" not in err
