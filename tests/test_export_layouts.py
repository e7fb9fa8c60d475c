"""Catches an export that a trainer's loader would misread: wrong names, shapes, dtypes, layers, shifts or side of the
norm, and rows that moved. Expectations are written from the loaders' source, whose place each exporter names; their own
code runs in test_export_speculators.py and test_export_loaders.py.
"""

import json
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from export_datasets import (
    PROMPTS,
    SEQ,
    SHAPE,
    assert_rounds_to,
    aux,
    behind_norm,
    certain_dataset,
    certain_trace,
    head_of_row,
    normed_dataset,
    pickled,
    traces,
)
from safetensors.torch import load_file
from tiny_datasets import Shape, make_dataset, random_trace

from distill_pipe.consume import ShardReader
from distill_pipe.consume.adapters import TrainerSamples, trainer_layout
from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import LAYOUTS, ExportOptions
from distill_pipe.consume.vocabulary import DraftVocabulary

AUX, LAST = (1, 2, 3), 4
pytest_plugins = ["export_fixtures"]
TRAINERS = list(LAYOUTS)


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


def test_the_dspark_cache_keeps_every_token_and_pads_to_one_length(exported, target_folder) -> None:
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
    stored = load_file(target_folder / "model.safetensors")
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


def test_a_draft_vocabulary_keeps_its_own_tokens_and_masks_rows_that_lead_out_of_it(normed, options, tmp_path) -> None:
    size = 20
    export(normed, "automodel-eagle3", tmp_path / "out", ExportOptions(target=options.target, seq_length=SEQ,
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


def test_a_draft_vocabulary_of_the_largest_mass_comes_as_the_trainer_stores_it(normed, tmp_path) -> None:
    chosen = DraftVocabulary.from_dataset(normed, 20).d2t_D
    options = ExportOptions(draft_vocab=20)
    found = []
    for trainer in ("specforge", "angelslim"):
        export(normed, trainer, tmp_path / trainer, options)
        found.append(torch.load(tmp_path / trainer / "vocab_mapping.pt", weights_only=True))
    report = export(normed, "speculators", tmp_path / "speculators", options)
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
def test_the_likeliest_token_of_a_certain_target_is_the_one_that_follows(tmp_path, target_folder, trainer) -> None:
    certain_dataset(tmp_path / "dataset")
    layout = trainer_layout(tmp_path / "dataset", trainer, ExportOptions(target=target_folder, seq_length=32))
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
def test_adapters_yield_what_is_in_the_files(normed, options, exported, trainer) -> None:
    layout = trainer_layout(normed, trainer, options)
    batches = list(ShardReader(normed, layers=layout.layers, batch_tokens=40))
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


def test_float32_states_stay_float32_where_a_trainer_takes_them(tmp_path) -> None:
    shape = Shape(layers=(1, 2, 3, 4), hidden_codec="f32", final_norm_eps=1e-5)
    normed_dataset(tmp_path / "dataset", shape, 2)
    export(tmp_path / "dataset", "specforge", tmp_path / "out", ExportOptions(dtype="f32"))
    sample = pickled(tmp_path / "out", "*.ckpt")[0]
    assert sample["aux_hidden_state"].dtype == torch.float32
    expected = torch.cat([torch.from_numpy(random_trace(0, shape).hidden[n]) for n in AUX], 1)
    assert torch.equal(sample["aux_hidden_state"][0], expected)
