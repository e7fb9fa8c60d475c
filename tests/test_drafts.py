"""Catches a draft that is compared with the wrong row, that sees what it must not see, that drafts another thing alone
than it was trained on in a batch, or whose checkpoint an engine would not load."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_drafts import SHAPE, TableDraft, one_batch, write_bigrams, write_target

from distill_pipe.consume import Batch, DraftVocabulary, ShardReader
from distill_pipe.consume.acceptance import heldout_acceptance
from distill_pipe.consume.drafts.checkpoint import DRAFTS, load_draft, new_draft, read_record, save_draft
from distill_pipe.consume.drafts.draft import Draft, drafted_rows
from distill_pipe.consume.drafts.target_files import read_config, read_weights
from distill_pipe.errors import DamageError, UsageError

KINDS = sorted(DRAFTS)
VOCABULARY = DraftVocabulary.from_ids(torch.arange(3, 27, 2), 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigrams(tmp_path_factory.mktemp("bigrams"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def make(kind: str, target: Path, positions: int = 3, vocabulary: DraftVocabulary | None = None) -> Draft:
    """A draft with every weight moved a little, so that nothing is the identity or zero."""
    torch.manual_seed(0)
    layers = DRAFTS[kind].layers_read(SHAPE.layers, SHAPE.num_layers)
    draft = new_draft(kind, read_config(target), layers, positions, vocabulary, target)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
    return draft


def test_a_draft_that_copies_the_target_is_accepted_at_every_position_and_no_other_alignment_is(root, target) -> None:
    reader = ShardReader(root, layers=SHAPE.layers, batch_tokens=100)
    found = heldout_acceptance(TableDraft(target), reader, "sampled")
    # Tail samples of a draft that equals the target all count in full, so there is no noise.
    assert [a.alpha for a in found] == pytest.approx([1] * 6, abs=1e-4)
    assert [a.rows for a in found] == sorted({a.rows for a in found}, reverse=True)
    for late in (-1, 1):
        assert all(a.alpha < 0.5 for a in heldout_acceptance(TableDraft(target, late), reader, "sampled"))


def test_a_draft_takes_its_vocabulary_along_to_another_device(target: Path) -> None:
    vocabulary = make("eagle3", target, vocabulary=VOCABULARY).to("meta").vocabulary
    assert (vocabulary.d2t_D.device.type, vocabulary.t2d_V.device.type) == ("meta", "meta")


@pytest.mark.parametrize("position", [0, 1, 4])
def test_rows_without_a_draft_output_are_left_out_and_all_others_kept(root: Path, position: int) -> None:
    batch = one_batch(root)
    index_R, row_R = drafted_rows(batch, position)
    assert torch.equal(batch.rows_R[row_R], index_R + 1 + position)
    assert torch.equal(batch.position_ids_T[index_R] + 1 + position, batch.position_ids_T[batch.rows_R[row_R]])
    assert len(row_R) == int((batch.position_ids_T[batch.rows_R] > position).sum()) < len(batch.rows_R)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sees_the_anchors_states_and_tokens_up_to_the_newest_and_nothing_later(kind, root, target) -> None:
    draft, batch = make(kind, target), one_batch(root)
    anchor, step = int(batch.cu_seqlens_B1[1]) + 5, 2
    before = [states_TH[anchor] for states_TH in draft(batch)]

    def moved(changed: Batch) -> list[bool]:
        return [not torch.equal(states_TH[anchor], was) for states_TH, was in zip(draft(changed), before, strict=True)]

    def with_token(at: int) -> Batch:
        tokens_T = batch.token_ids_T.clone()
        tokens_T[at] = (tokens_T[at] + 1) % 32
        return replace(batch, token_ids_T=tokens_T)

    def with_state(at: int) -> Batch:
        hidden = {n: h.clone() for n, h in batch.hidden.items()}
        for hidden_TH in hidden.values():
            hidden_TH[at] = hidden_TH[at].flip(0)
        return replace(batch, hidden=hidden)

    assert moved(with_state(anchor)) == [True, True, True]
    assert moved(with_state(anchor + 1)) == [False, False, False]
    for ahead in range(1, 4):
        reads = [k >= ahead - 1 and kind != "medusa" for k in range(step + 1)]
        assert moved(with_token(anchor + ahead)) == reads


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_one_batch_do_not_see_each_other(kind, root, target) -> None:
    draft, batch = make(kind, target), one_batch(root)
    start, stop = batch.cu_seqlens_B1[1:3].tolist()
    its_rows_R = batch.rows_R[(batch.rows_R >= start) & (batch.rows_R < stop)] - start
    alone = replace(batch, token_ids_T=batch.token_ids_T[start:stop], position_ids_T=torch.arange(stop - start),
                    cu_seqlens_B1=torch.tensor([0, stop - start]), rows_R=its_rows_R,
                    hidden={n: h[start:stop] for n, h in batch.hidden.items()})
    for k, (together_TH, alone_TH) in enumerate(zip(draft(batch), draft(alone), strict=True)):
        anchors_A, _ = drafted_rows(alone, k)
        assert len(anchors_A) > 0
        assert torch.allclose(together_TH[start + anchors_A], alone_TH[anchors_A], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_narrowed_to_some_anchors_goes_on_as_the_whole_would(kind, root, target) -> None:
    draft, batch = make(kind, target), one_batch(root)
    whole = every_anchor(draft, batch)
    anchors_A = torch.tensor([2, 5, int(batch.cu_seqlens_B1[2]) + 1])
    chain = draft.begin(batch.hidden, batch.position_ids_T, batch.cu_seqlens_B1)
    assert torch.equal(chain.step(batch.token_ids_T.roll(-1)), whole[0])
    chain.narrow(anchors_A)
    for k in (1, 2):
        narrowed_AH = chain.step(batch.token_ids_T.roll(-1 - k)[anchors_A])
        assert torch.allclose(narrowed_AH, whole[k][anchors_A], atol=1e-5)


def every_anchor(draft: Draft, batch: Batch) -> list[torch.Tensor]:
    chain = draft.begin(batch.hidden, batch.position_ids_T, batch.cu_seqlens_B1)
    return [chain.step(batch.token_ids_T.roll(-1 - k)) for k in range(draft.positions)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_every_state_that_has_a_row(kind, root, target) -> None:
    draft, batch = make(kind, target), one_batch(root)
    for k, (states_TH, wanted_TH) in enumerate(zip(draft(batch), every_anchor(draft, batch), strict=True)):
        anchors_A, _ = drafted_rows(batch, k)
        assert torch.allclose(states_TH[anchors_A], wanted_TH[anchors_A], atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_a_later_step_attends_as_the_same_tokens_in_one_row_would(kind, root, target) -> None:
    """An engine writes the later steps' keys behind the first ones and runs plain causal attention."""
    draft, batch = make(kind, target), one_batch(root)
    anchor = 4
    states = [states_TH[anchor] for states_TH in draft(batch)]
    layer = draft.midlayer if kind == "eagle3" else draft.model.only_layer
    embedding = draft.embed_tokens if kind == "eagle3" else draft.model.embed_tokens
    from distill_pipe.consume.drafts.decoder import Memory

    inputs_TH = states_before_step_0(draft, batch)[:anchor + 1]
    for k in range(3):
        ids_T = batch.token_ids_T[1:anchor + 2 + k]
        embeds_TH = embedding(ids_T)
        if kind == "mtp":
            embeds_TH[0] = 0.0
        positions_T = torch.arange(len(ids_T))
        out_TH = layer(embeds_TH, inputs_TH, positions_T, Memory(positions_T, torch.tensor([0, len(ids_T)])))
        assert torch.allclose(out_TH[-1], states[k], atol=1e-5)
        inputs_TH = torch.cat([inputs_TH, out_TH[-1:]])


def states_before_step_0(draft: Draft, batch: Batch) -> torch.Tensor:
    if draft.arch == "mtp":
        return draft.final_state(batch.hidden)
    normed = [norm(batch.hidden[n]) for n, norm in zip(draft.layers, draft.fc_norm, strict=True)]
    return draft.fc(torch.cat(normed, 1))


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY], ids=["whole", "truncated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_draft_comes_back_the_same(kind, vocabulary, root, target, tmp_path) -> None:
    draft, batch = make(kind, target, vocabulary=vocabulary), one_batch(root)
    save_draft(draft, tmp_path, target="tiny", holdout_every=7)
    again = load_draft(tmp_path, target)
    for k, (was_TH, is_TH) in enumerate(zip(draft(batch), again(batch), strict=True)):
        assert torch.equal(draft.logits(was_TH, k), again.logits(is_TH, k))
        assert draft.logits(was_TH, k).shape[1] == (32 if vocabulary is None else 12)
    assert (read_record(tmp_path).arch, read_record(tmp_path).holdout_every) == (kind, 7)


def test_a_truncated_vocabulary_is_stored_as_released_drafts_do(target, tmp_path) -> None:
    save_draft(make("eagle3", target, vocabulary=VOCABULARY), tmp_path, target="tiny", holdout_every=7)
    stored = load_file(tmp_path / "model.safetensors")
    assert (stored["d2t"] + torch.arange(12)).tolist() == list(range(3, 27, 2))
    assert stored["t2d"].dtype == torch.bool
    assert stored["t2d"].nonzero()[:, 0].tolist() == list(range(3, 27, 2))
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] == 12


def test_weights_that_do_not_belong_to_a_draft_are_refused(target, tmp_path) -> None:
    save_draft(make("mtp", target), tmp_path, target="tiny", holdout_every=7)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "q_proj" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(DamageError, match="q_proj"):
        load_draft(tmp_path, target)
    save_file(weights | {"extra": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DamageError, match="holds more"):
        load_draft(tmp_path, target)
    (tmp_path / "draft.json").write_text("{}")
    with pytest.raises(UsageError, match="not a draft"):
        load_draft(tmp_path, target)


def test_a_separate_lm_head_is_taken_over(target, tmp_path) -> None:
    tied = new_draft("eagle3", read_config(target), (1, 2), 2, None, target)
    assert torch.equal(tied.lm_head.weight, torch.eye(32))
    assert torch.equal(tied.norm.weight, torch.full((32,), 2.0))
    other = write_target(tmp_path, {"lm_head.weight": torch.arange(32.0)[:, None].repeat(1, 32)})
    truncated = new_draft("medusa", read_config(other), (4,), 2, VOCABULARY, other)
    assert truncated.lm_heads[1].weight[:, 0].tolist() == list(range(3, 27, 2))


def test_weights_are_read_from_an_indexed_set_of_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {n: len(w) for n, w in read_weights(tmp_path, ("a", "b", "absent")).items()} == {"a": 2, "b": 3}


@pytest.mark.parametrize("kind", ["medusa", "mlp_speculator", "mtp"])
def test_a_dataset_without_the_last_layer_is_refused_by_the_drafts_that_read_it(kind: str) -> None:
    with pytest.raises(UsageError, match=r"Generate it with --layers \.\.\.,4"):
        DRAFTS[kind].layers_read((1, 2), 4)
