"""Catches an export that a trainer's loader would misread: wrong names, shapes, dtypes, layers, shifts or side of the
norm, and rows that moved. The loaders' own code is not here (but see test_export_speculators.py); expectations are
written from their source, whose place each exporter names.
"""

import json
import resource
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from export_datasets import (
    PROMPTS,
    SHAPE,
    assert_rounds_to,
    aux,
    behind_norm,
    certain_dataset,
    certain_trace,
    normed_dataset,
    target_weights,
)
from safetensors.torch import load_file
from tiny_datasets import Shape, make_dataset, random_trace, start_run

from distill_pipe.consume import ShardReader
from distill_pipe.consume.adapters import TrainerSamples, trainer_layout
from distill_pipe.consume.export import RECORD, ExportReport, export
from distill_pipe.consume.exporters import LAYOUTS, ExportOptions
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import DamageError, MismatchError, StorageFullError, UsageError
from distill_pipe.store.finalize import finalize
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.trace import Trace

AUX, LAST = (1, 2, 3), 4
TRAINERS = list(LAYOUTS)
SEQ = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    normed_dataset(folder)
    finalize(LocalRoot(folder))
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "weights"
    target_weights(folder)
    return folder


@pytest.fixture(scope="module")
def options(target: Path) -> ExportOptions:
    return ExportOptions(target=target, seq_length=SEQ)


Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(root: Path, options: ExportOptions, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export for a trainer, made once."""
    made: dict[str, Path] = {}

    def folder(trainer: str) -> Path:
        if trainer not in made:
            made[trainer] = tmp_path_factory.mktemp("export") / trainer
            export(root, trainer, made[trainer], options)
        return made[trainer]

    return folder


def traces() -> list[Trace]:
    return [random_trace(i, SHAPE) for i in range(PROMPTS)]


def pickled(folder: Path, pattern: str) -> list[dict[str, torch.Tensor]]:
    files = sorted(folder.rglob(pattern), key=lambda p: int(p.stem.rpartition("_")[2]))
    return [torch.load(f, weights_only=True) for f in files]


def head_of_row(trace: Trace, row: int) -> tuple[list[int], np.ndarray]:
    ends = trace.topk_counts_R.cumsum()
    span = slice(ends[row] - trace.topk_counts_R[row], ends[row])
    return trace.topk_ids_N[span].tolist(), trace.topk_logprobs_N[span]


@pytest.mark.parametrize(("trainer", "pattern", "aux_key", "last_key", "batched"), [
    ("specforge", "*.ckpt", "aux_hidden_state", "hidden_state", False),
    ("modelopt", "*.pt", "aux_hidden_states", "hidden_states", False),
    ("angelslim", "*.ckpt", "hidden_states", "target_hiddens", True)])
def test_pickled_samples_hold_the_paired_tokens_and_states_behind_the_norm(exported, trainer, pattern, aux_key,
                                                                           last_key, batched) -> None:
    samples = pickled(exported(trainer), pattern)
    assert len(samples) == PROMPTS
    for sample, trace in zip(samples, traces(), strict=True):
        ids, mask = (sample[name].squeeze(0) if batched else sample[name] for name in ("input_ids", "loss_mask"))
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.tolist() == trace.token_ids_T[:-1].tolist()
        assert mask.tolist() == trace.loss_mask_T[:-1].astype(int).tolist()
        lead = () if trainer == "modelopt" else (1,)
        assert sample[aux_key].shape == (*lead, len(ids), len(AUX) * SHAPE.hidden_size)
        assert torch.equal(sample[aux_key].flatten(0, -2), aux(trace, AUX))
        assert sample[last_key].shape == (*lead, len(ids), SHAPE.hidden_size)
        assert_rounds_to(sample[last_key].flatten(0, -2), behind_norm(trace, LAST))


def test_the_names_in_pickled_files_are_those_that_loaders_ask_for(exported) -> None:
    assert set(pickled(exported("specforge"), "*.ckpt")[0]) == {"input_ids", "loss_mask", "hidden_state",
                                                                "aux_hidden_state"}
    assert set(pickled(exported("angelslim"), "*.ckpt")[0]) == {"input_ids", "loss_mask", "target_hiddens",
                                                                "hidden_states"}
    modelopt = pickled(exported("modelopt"), "*.pt")[0]
    assert set(modelopt) == {"input_ids", "loss_mask", "hidden_states", "aux_hidden_states", "hidden_states_prenorm"}
    assert not bool(modelopt["hidden_states_prenorm"])


def test_deepspecs_index_leads_to_every_tensor(exported) -> None:
    folder = exported("deepspec")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["version"], manifest["num_samples"], manifest["index_record_size"]) == (2, PROMPTS, 56)
    assert (manifest["target_layer_ids"], manifest["hidden_size"]) == ([0, 1, 2], SHAPE.hidden_size)
    assert manifest["hidden_dtype"] == "bfloat16"
    assert [s["shard_id"] for s in manifest["shards"]] == list(range(manifest["num_shards"]))
    index = (folder / "samples.idx").read_bytes()
    assert len(index) == 56 * PROMPTS
    for number, trace in enumerate(traces()):
        sample_id, shard, length, *offsets = struct.unpack_from("<QIIQQQQQ", index, 56 * number)
        data = (folder / manifest["shards"][shard]["file_name"]).read_bytes()

        def tensor(offset: int, dtype: type, count: int, data: bytes = data) -> np.ndarray:
            return np.frombuffer(data, dtype, count, offset)

        assert (sample_id, length) == (number, trace.num_tokens - 1)
        assert tensor(offsets[0], np.int32, length).tolist() == trace.token_ids_T[:-1].tolist()
        assert tensor(offsets[1], np.uint8, length).tolist() == [1] * length
        assert tensor(offsets[2], np.uint8, length).tolist() == trace.loss_mask_T[:-1].astype(int).tolist()
        width = len(AUX) * SHAPE.hidden_size
        aux_SW = torch.from_numpy(tensor(offsets[3], np.int16, length * width).copy()).view(torch.bfloat16)
        assert torch.equal(aux_SW.view(length, width), aux(trace, AUX))
        last_SH = torch.from_numpy(tensor(offsets[4], np.int16, length * SHAPE.hidden_size).copy())
        assert_rounds_to(last_SH.view(torch.bfloat16).view(length, -1), behind_norm(trace, LAST))


def test_deepspec_starts_a_new_file_after_sixteen_samples(tmp_path) -> None:
    normed_dataset(tmp_path / "dataset", num_prompts=35)
    export(tmp_path / "dataset", "deepspec", tmp_path / "out")
    index = (tmp_path / "out" / "samples.idx").read_bytes()
    found = [struct.unpack_from("<QIIQQQQQ", index, 56 * i)[:4] for i in range(35)]
    assert [f[1] for f in found] == [i // 16 for i in range(35)]
    assert [f[3] for f in found if f[0] % 16 == 0] == [0, 0, 0]
    sizes = [p.stat().st_size for p in sorted((tmp_path / "out").glob("shard-*.bin"))]
    per_position = 4 + 1 + 1 + 2 * (len(AUX) + 1) * SHAPE.hidden_size
    assert sizes == [sum(f[2] for f in found if f[1] == s) * per_position for s in range(3)]


def cache(folder: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    shards = [load_file(p) for p in sorted(folder.glob("shard-??????.safetensors"))]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return manifest, {name: torch.cat([s[name] for s in shards]) for name in shards[0]}


def test_the_dspark_cache_keeps_every_token_and_pads_to_one_length(exported, target) -> None:
    manifest, fields = cache(exported("automodel-dspark"))
    assert set(fields) == {"input_ids", "loss_mask", "target_hidden_states", "target_last_hidden_states"}
    assert fields["input_ids"].shape == (PROMPTS, SEQ)
    for i, trace in enumerate(traces()):
        tokens, paired = min(trace.num_tokens, SEQ), min(trace.num_tokens - 1, SEQ)
        assert fields["input_ids"][i].tolist() == trace.token_ids_T[:tokens].tolist() + [0] * (SEQ - tokens)
        assert fields["loss_mask"][i].sum() == trace.loss_mask_T[:tokens].sum()
        assert torch.equal(fields["target_hidden_states"][i, :paired], aux(trace, AUX)[:paired])
        assert_rounds_to(fields["target_last_hidden_states"][i, :paired], behind_norm(trace, LAST)[:paired])
        assert not fields["target_hidden_states"][i, paired:].any()
    assert (manifest["format_version"], manifest["complete"], manifest["num_samples"]) == (1, True, PROMPTS)
    assert (manifest["target_layer_ids"], manifest["target_model_type"]) == ([0, 1, 2], "tiny")
    assert (manifest["target_hidden_dim"], manifest["seq_length"], manifest["dtype"]) == (24, SEQ, "bf16")
    weights = load_file(exported("automodel-dspark") / "target_weights.safetensors")
    stored = load_file(target / "model.safetensors")
    assert torch.equal(weights["embed_tokens.weight"], stored["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(weights["lm_head.weight"], stored["lm_head.weight"].bfloat16())


def test_the_eagle3_cache_is_shifted_by_one_against_the_states(exported) -> None:
    manifest, fields = cache(exported("automodel-eagle3"))
    assert set(fields) == {"input_ids", "attention_mask", "loss_mask", "aux_hidden_states", "position_mask",
                           "target_probs_values", "target_probs_indices"}
    assert fields["target_probs_indices"].dtype == torch.int32
    assert fields["position_mask"].shape == (PROMPTS, SEQ, 1)
    assert (manifest["format_version"], manifest["target_probs_topk"]) == (2, SHAPE.top_k)
    assert (manifest["aux_layer_ids"], manifest["aux_hidden_dim"]) == ([0, 1, 2], 24)
    assert manifest["selected_token_ids"] == list(range(SHAPE.vocab_size))
    for i, trace in enumerate(traces()):
        steps = min(trace.num_tokens - 1, SEQ)
        assert fields["input_ids"][i, :steps].tolist() == trace.token_ids_T[1:][:steps].tolist()
        assert fields["attention_mask"][i].sum() == steps
        assert torch.equal(fields["aux_hidden_states"][i, :steps], aux(trace, AUX)[:steps])
        for row, position in enumerate(trace.positions_R.tolist()):
            if not 1 <= position <= SEQ:
                continue
            ids, logprobs = head_of_row(trace, row)
            # What a draft step at t = position - 1 is compared with.
            assert fields["target_probs_indices"][i, position - 1].tolist() == ids
            expected = torch.from_numpy(logprobs).softmax(0)
            torch.testing.assert_close(fields["target_probs_values"][i, position - 1].float(), expected, rtol=2**-7,
                                       atol=0)
            assert bool(fields["position_mask"][i, position - 1]) == bool(trace.loss_mask_T[position])


def test_a_draft_vocabulary_keeps_its_own_tokens_and_masks_rows_that_lead_out_of_it(root, options, tmp_path) -> None:
    size = 20
    export(root, "automodel-eagle3", tmp_path / "out", ExportOptions(target=options.target, seq_length=SEQ,
                                                                      draft_vocab=size))
    manifest, fields = cache(tmp_path / "out")
    selected = manifest["selected_token_ids"]
    assert (len(selected), manifest["draft_vocab_size"], selected) == (size, size, sorted(selected))
    values, indices = fields["target_probs_values"], fields["target_probs_indices"].long()
    full = torch.zeros(*values.shape[:2], size, dtype=values.dtype).scatter_(-1, indices, values).float()
    inside = [0, 0]
    for i, trace in enumerate(traces()):
        for row, position in enumerate(trace.positions_R.tolist()):
            if not 1 <= position <= SEQ:
                continue
            ids, logprobs = head_of_row(trace, row)
            held = [(selected.index(token), p) for token, p in zip(ids, np.exp(logprobs), strict=True)
                    if token in selected]
            expected = torch.zeros(size)
            for draft_id, p in held:
                expected[draft_id] = float(p) / sum(float(q) for _, q in held)
            torch.testing.assert_close(full[i, position - 1], expected, rtol=2**-6, atol=1e-6)
            supervised = bool(trace.loss_mask_T[position]) and ids[0] in selected
            assert bool(fields["position_mask"][i, position - 1]) == supervised
            inside[supervised] += 1
    assert min(inside) > 10


def test_a_draft_vocabulary_of_the_largest_mass_comes_as_the_trainer_stores_it(root, tmp_path) -> None:
    chosen = DraftVocabulary.from_dataset(root, 20).d2t_D
    options = ExportOptions(draft_vocab=20)
    found = []
    for trainer in ("specforge", "angelslim"):
        export(root, trainer, tmp_path / trainer, options)
        found.append(torch.load(tmp_path / trainer / "vocab_mapping.pt", weights_only=True))
    report = export(root, "speculators", tmp_path / "speculators", options)
    assert "d2t-20.npy" in report.notes[0]
    found.append({name: torch.from_numpy(np.load(tmp_path / "speculators" / f"{name}-20.npy", allow_pickle=False))
                  for name in ("d2t", "t2d")})
    for mapping in found:
        assert torch.equal(mapping["d2t"] + torch.arange(20), chosen)
        assert (mapping["t2d"].dtype, mapping["t2d"].shape) == (torch.bool, (SHAPE.vocab_size,))
        assert torch.equal(mapping["t2d"].nonzero()[:, 0], chosen)


def test_axolotls_rows_hold_the_renormalised_head_at_the_position_it_predicts_from(exported) -> None:
    rows = datasets.load_from_disk(exported("axolotl"))
    assert {"input_ids", "attention_mask", "labels"} <= set(rows.features)
    assert len(rows) == PROMPTS
    for row, trace in zip(rows, traces(), strict=True):
        assert row["input_ids"] == trace.token_ids_T.tolist()
        assert row["labels"] == np.where(trace.loss_mask_T, trace.token_ids_T, -100).tolist()
        supervised = [any(mask) for mask in row["target_mask"]]
        assert np.flatnonzero(supervised).tolist() == trace.positions_R.tolist()
        for r, position in enumerate(trace.positions_R.tolist()):
            ids, logprobs = head_of_row(trace, r)
            assert row["target_token_ids"][position] == ids
            np.testing.assert_allclose(row["target_logprobs"][position],
                                       torch.from_numpy(logprobs).log_softmax(0), atol=1e-5)


def test_distillkits_rows_hold_the_head_as_it_is_and_labels_that_mark_its_positions(exported) -> None:
    rows = datasets.load_from_disk(exported("distillkit"))
    for row, trace in zip(rows, traces(), strict=True):
        marked = np.flatnonzero(np.array(row["labels"]) != -100)
        assert marked.tolist() == trace.positions_R.tolist()
        values = np.array(row["top_values"])
        assert values.shape == (trace.num_tokens, SHAPE.top_k)
        assert np.isfinite(values).all()
        # The trainer takes log(1 - mass) of every position, masked or not.
        assert (np.exp(values).sum(1) < 0.999).all()
        for r, position in enumerate(trace.positions_R.tolist()):
            ids, logprobs = head_of_row(trace, r)
            assert row["token_ids"][position] == ids
            np.testing.assert_allclose(values[position], logprobs, atol=2e-6)


def test_heads_of_different_sizes_are_padded_with_entries_that_count_for_nothing(tmp_path) -> None:
    shape = Shape(vocab_size=6, top_k=8, tail_samples=0, layers=())
    make_dataset(tmp_path / "dataset", 3, shape)
    for trainer in ("axolotl", "distillkit"):
        export(tmp_path / "dataset", trainer, tmp_path / trainer)
    for row in datasets.load_from_disk(tmp_path / "axolotl"):
        assert {sum(mask) for mask in row["target_mask"]} <= {0, 6}
    for ordinal, row in enumerate(datasets.load_from_disk(tmp_path / "distillkit")):
        values = np.exp(np.array(row["top_values"]))[random_trace(ordinal, shape).positions_R]
        np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("trainer", ["axolotl", "distillkit", "automodel-eagle3"])
def test_the_likeliest_token_of_a_certain_target_is_the_one_that_follows(tmp_path, target, trainer) -> None:
    certain_dataset(tmp_path / "dataset")
    layout = trainer_layout(tmp_path / "dataset", trainer, ExportOptions(target=target, seq_length=32))
    reader = ShardReader(tmp_path / "dataset", layers=layout.layers, batch_tokens=30)
    compared = 0
    for batch in reader:
        for ordinal, sample in zip(batch.ordinals_B.tolist(), TrainerSamples([batch], layout), strict=True):
            ids = certain_trace(ordinal).token_ids_T
            for position, following in _likeliest(trainer, sample):
                assert following == ids[position + 1]
                compared += 1
    assert compared > 10


def _likeliest(trainer: str, sample: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Positions that are trained, and what the sample calls the likeliest next token there."""
    if trainer == "axolotl":
        trained = sample["target_mask"].any(1).nonzero().flatten().tolist()
        return [(t, int(sample["target_token_ids"][t, sample["target_logprobs"][t].argmax()])) for t in trained]
    if trainer == "distillkit":
        trained = (sample["labels"] >= 0).nonzero().flatten().tolist()
        return [(t, int(sample["token_ids"][t, sample["top_values"][t].argmax()])) for t in trained]
    trained = sample["position_mask"][:, 0].nonzero().flatten().tolist()
    return [(t + 1, int(sample["target_probs"][t].argmax())) for t in trained]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_adapters_yield_what_is_in_the_files(root, options, exported, trainer) -> None:
    layout = trainer_layout(root, trainer, options)
    batches = list(ShardReader(root, layers=layout.layers, batch_tokens=40))
    ordinals = [int(o) for b in batches for o in b.ordinals_B]
    for ordinal, item in zip(ordinals, TrainerSamples(batches, layout), strict=True):
        for name, expected in stored_item(trainer, exported(trainer), ordinal).items():
            assert torch.equal(item[name].to(expected.dtype), expected), (name, item[name], expected)


def stored_item(trainer: str, folder: Path, number: int) -> dict[str, torch.Tensor]:
    """The tensors of a sample that a loader hands on as they are, read from its file."""
    if trainer in ("axolotl", "distillkit"):
        return {k: torch.tensor(v) for k, v in datasets.load_from_disk(folder)[number].items()}
    if trainer.startswith("automodel"):
        return {k: v[number] for k, v in cache(folder)[1].items() if not k.startswith("target_probs")}
    if trainer == "speculators":
        stored = load_file(folder / "hidden_states" / f"hs_{number}.safetensors")
        return {"input_ids": stored["token_ids"], "verifier_last_hidden_states": stored["hidden_states"][:, -1],
                "hidden_states": stored["hidden_states"][:, :-1].flatten(1)}
    if trainer == "deepspec":
        return {"input_ids": torch.from_numpy(random_trace(number, SHAPE).token_ids_T[:-1])}
    stored = pickled(folder, "*.pt" if trainer == "modelopt" else "*.ckpt")[number]
    return {k: v for k, v in stored.items() if k in ("input_ids", "loss_mask", "hidden_state", "aux_hidden_state",
                                                      "aux_hidden_states", "target_hiddens")}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_interrupted_export_is_continued_and_ends_in_the_same_bytes(root, options, exported, tmp_path, trainer
                                                                       ) -> None:
    whole, out = exported(trainer), tmp_path / "out"

    class Stop(Exception):  # noqa: N818 - not an error
        pass

    def stop(done: int, of: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        export(root, trainer, out, options, stop)
    assert not (out / "manifest.json").exists()
    assert not (out / "state.json").exists()
    report = export(root, trainer, out, options)
    files = LAYOUTS[trainer].samples_per_file
    assert (report.files_kept, report.files_written) == (1, -(-PROMPTS // files) - 1)
    assert contents(out) == contents(whole)
    assert export(root, trainer, out, options).files_written == 0


def contents(folder: Path) -> dict[str, bytes]:
    # A pickle archive names the file it was first written to.
    return {str(p.relative_to(folder)): _loaded(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _loaded(path: Path) -> bytes:
    if path.suffix in (".ckpt", ".pt"):
        return repr({k: v.tolist() for k, v in torch.load(path, weights_only=True).items()}).encode()
    return path.read_bytes()


def test_a_file_that_a_killed_export_left_half_done_has_a_name_no_loader_takes(root, options, tmp_path, monkeypatch
                                                                               ) -> None:
    seen = []

    def dies(self: object, path: Path, samples: object) -> None:
        path.write_bytes(b"half")
        seen.append(path)
        raise OSError("no space left")

    monkeypatch.setattr(LAYOUTS["specforge"], "write", dies)
    with pytest.raises(OSError, match="no space left"):
        export(root, "specforge", tmp_path / "out", options)
    assert seen[0].name.startswith(".")
    assert seen[0].suffix == ".part"
    assert not list((tmp_path / "out").rglob("*.ckpt"))
    assert not seen[0].exists()


@pytest.mark.parametrize("trainer", ["speculators", "specforge", "deepspec", "axolotl"])
def test_a_full_disk_ends_in_one_error_and_leaves_no_file_that_a_loader_would_take(root, options, tmp_path, trainer
                                                                                   ) -> None:
    # A limit on the size of files fails like a quota does, whoever writes: Python, torch, safetensors or Arrow.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        with pytest.raises(StorageFullError, match="free some room, then run the same command again"):
            export(root, trainer, tmp_path / "out", options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == [RECORD]
    assert export(root, trainer, tmp_path / "out", options).files_kept == 0


def test_float32_states_stay_float32_where_a_trainer_takes_them(tmp_path) -> None:
    shape = Shape(layers=(1, 2, 3, 4), hidden_codec="f32", final_norm_eps=1e-5)
    normed_dataset(tmp_path / "dataset", shape, 2)
    export(tmp_path / "dataset", "specforge", tmp_path / "out", ExportOptions(dtype="f32"))
    sample = pickled(tmp_path / "out", "*.ckpt")[0]
    assert sample["aux_hidden_state"].dtype == torch.float32
    expected = torch.cat([torch.from_numpy(random_trace(0, shape).hidden[n]) for n in AUX], 1)
    assert torch.equal(sample["aux_hidden_state"][0], expected)


def test_the_report_counts_what_was_written_and_names_layers_on_both_sides(root, options, tmp_path) -> None:
    report: ExportReport = export(root, "automodel-eagle3", tmp_path / "out", options)
    assert (report.samples, report.tokens) == (PROMPTS, sum(t.num_tokens for t in traces()))
    assert (report.layers, report.layer_ids) == ((1, 2, 3), (0, 1, 2))
    assert report.cut_traces == sum(t.num_tokens - 1 > SEQ for t in traces()) > 0
    rows = np.concatenate([t.tail_mass_R for t in traces()])
    assert report.dropped_mass == pytest.approx(float(rows.mean()), rel=1e-5)
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.mark.parametrize(("shape", "trainer", "given", "says"), [
    ({"layers": ()}, "specforge", {}, "run generate with --layers 2,10,17,20"),
    ({"layers": (2, 10, 17)}, "specforge", {}, ("does not store layer 20, the last state, which specforge needs: run "
                                              "generate with --layers 2,10,17,20")),
    ({"layers": (2, 20)}, "angelslim", {}, "run generate with --layers 2,10,17,20"),
    ({"layers": (2, 10, 17, 20)}, "deepspec", {"layers": (3,)}, "does not store layers 3 that deepspec needs"),
    ({"layers": (2, 10, 17, 20)}, "deepspec", {"layers": (3,)}, "run generate with --layers 3,20"),
    ({"layers": (1, 2, 10, 17, 20)}, "specforge", {}, "takes exactly 3 auxiliary layers, not 1, 2, 10, 17: name them"),
    ({"layers": (2, 10, 17, 20)}, "modelopt", {"layers": (2, 20)}, "leave it out of --layers"),
    ({"layers": (0, 2, 10, 20)}, "specforge", {}, "has no number for layer 0"),
    ({"layers": (0, 2, 10, 20)}, "automodel-eagle3", {}, "has no number for layer 0"),
    ({"layers": (2, 10, 17, 20), "final_norm_eps": None}, "specforge", {}, "or export for a trainer that takes "),
    ({"layers": (2, 10, 17, 20), "architecture": "OddForCausalLM"}, "deepspec", {}, "how OddForCausalLM gets from"),
    ({}, "axolotl", {"top_k": 16}, "stores 8 head entries per row, not 16: run generate with --top-k 16"),
    ({"layers": (2, 10, 17, 20)}, "deepspec", {"dtype": "f32"}, "takes hidden states as bf16, not f32"),
    ({"layers": (2, 10, 17, 20)}, "specforge", {"dtype": "fp8"}, "takes hidden states as bf16 or f32, not fp8"),
    ({"layers": (2, 10, 17)}, "automodel-eagle3", {"draft_vocab": 10}, "statistics: run `distill-pipe finalize"),
    ({"layers": (2, 10, 17, 20)}, "modelopt", {"draft_vocab": 20}, "modelopt has no use for --draft-vocab"),
    ({"layers": (2, 10, 17, 20)}, "specforge", {"draft_vocab": 20}, "statistics: run `distill-pipe finalize"),
    ({"layers": (2, 10, 17)}, "automodel-eagle3", {"draft_vocab": 65}, "must be between 2 and 64"),
    ({"layers": (2, 10, 17)}, "automodel-eagle3", {}, "give the target's folder with --target"),
    ({}, "torchspec", {}, "unknown trainer 'torchspec': give one of speculators, specforge"),
])
def test_a_dataset_that_lacks_what_a_trainer_needs_is_refused_with_the_option_to_add(tmp_path, shape, trainer, given,
                                                                                     says) -> None:
    normed_dataset(tmp_path / "dataset", Shape(**{"num_layers": 20, "final_norm_eps": 1e-5} | shape), 2)
    with pytest.raises(UsageError) as refused:
        export(tmp_path / "dataset", trainer, tmp_path / "out", ExportOptions(**given))
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_in_an_object_store_is_exported_alike(exported, options, tmp_path) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    normed_dataset(place)
    export(place, "specforge", tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(exported("specforge"))


def test_deepspec_is_told_the_target_that_its_configuration_names(root, options, exported, tmp_path) -> None:
    def named(folder: Path) -> str:
        return json.loads((folder / "manifest.json").read_bytes())["target_model_name_or_path"]

    assert named(exported("deepspec")) == str(options.target)
    report = export(root, "deepspec", tmp_path / "out", ExportOptions(target=Path("/models/tiny")))
    assert "has to read /models/tiny" in report.notes[0]
    assert named(tmp_path / "out") == "/models/tiny"


def test_an_unfinished_dataset_is_refused(tmp_path) -> None:
    run: Run = start_run(tmp_path / "dataset", 8, SHAPE)
    with pytest.raises(UsageError, match=f"2 of {run.spec.num_shards} shards are missing; run generate again"):
        export(tmp_path / "dataset", "axolotl", tmp_path / "out")


def test_heldout_traces_stay_out_of_a_training_export(root, options, tmp_path) -> None:
    def ids(split: str) -> list[list[int]]:
        given = ExportOptions(split=split, holdout_every=4)
        export(root, "specforge", tmp_path / split, given)
        samples = pickled(tmp_path / split, "*.ckpt")
        assert len(samples) == export(root, "specforge", tmp_path / split, given).samples
        return [sample["input_ids"].tolist() for sample in samples]

    kept = [[t.token_ids_T[:-1].tolist() for t in traces() if (t.ordinal % 4 == 3) == heldout]
            for heldout in (False, True)]
    assert [ids("train"), ids("heldout")] == kept
    with pytest.raises(MismatchError, match="split: stored train, given all"):
        export(root, "specforge", tmp_path / "train", ExportOptions(holdout_every=4))
    for trainer in ("speculators", "deepspec"):
        export(root, trainer, tmp_path / trainer, ExportOptions(split="train", holdout_every=4))
    assert len(datasets.load_from_disk(tmp_path / "speculators")) == len(kept[0])
    assert [row["input_ids"] for row in datasets.load_from_disk(tmp_path / "speculators").with_format(None)] == kept[0]
    assert (tmp_path / "deepspec" / "samples.idx").stat().st_size == 56 * len(kept[0])


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(root, options, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and no export"):
        export(root, "specforge", tmp_path / "out", options)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_another_export_into_the_same_folder_is_refused_with_what_differs(root, options, exported) -> None:
    with pytest.raises(MismatchError, match="dtype: stored bf16, given f32"):
        export(root, "specforge", exported("specforge"), ExportOptions(dtype="f32", seq_length=SEQ))
    with pytest.raises(MismatchError, match="trainer: stored specforge, given modelopt"):
        export(root, "modelopt", exported("specforge"), options)


def test_a_missing_sidecar_ends_the_export_with_its_name(tmp_path) -> None:
    normed_dataset(tmp_path / "dataset")
    [gone, *_] = sorted((tmp_path / "dataset" / "hidden_states").rglob("*.parquet"))
    gone.unlink()
    with pytest.raises(DamageError, match=gone.name):
        export(tmp_path / "dataset", "specforge", tmp_path / "out")




def test_an_export_killed_outright_is_continued(root, exported, options, tmp_path) -> None:
    killed = f"""
import os, signal
from pathlib import Path
from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import ExportOptions
export({str(root)!r}, "specforge", {str(tmp_path / "out")!r}, ExportOptions(seq_length={SEQ}),
       lambda done, of: os.kill(os.getpid(), signal.SIGKILL) if done == 4 else None)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").rglob("*.ckpt"))) == 4
    assert export(root, "specforge", tmp_path / "out", options).files_kept == 4
    assert contents(tmp_path / "out") == contents(exported("specforge"))
