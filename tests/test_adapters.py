"""Catches an adapter, or a layout behind it, that changes a number, at any codec, rounding and packing."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from export_datasets import PROMPTS, SHAPE, normed_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_datasets import Shape, random_trace
from torch.utils.data import DataLoader

from distill_pipe.consume import Batch, ShardReader
from distill_pipe.consume.adapters import TrainerSamples, trainer_layout
from distill_pipe.consume.exporters import LAYOUTS, ExportOptions
from distill_pipe.consume.exporters.record import batch_records
from distill_pipe.consume.packing import padding
from distill_pipe.store.codec import STEP_OF_RMS
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import open_root

# By trainer: where the auxiliary states are, and where the state of the last layer.
STATES = {"speculators": ("hidden_states", "verifier_last_hidden_states"), "specforge": ("aux_hidden_state", None),
          "modelopt": ("aux_hidden_states", None), "automodel-dspark": ("target_hidden_states", None),
          "automodel-eagle3": ("aux_hidden_states", None), "deepspec": ("target_hidden_states", None),
          "angelslim": ("hidden_states", None)}
CODECS = ("f32", "bf16", "bf16-split", "fp8", "q8", "q6", "q5")


def samples(root: Path, trainer: str, options: ExportOptions, batch_tokens: int) -> dict[int, dict[str, torch.Tensor]]:
    layout = trainer_layout(root, trainer, options)
    batches = list(ShardReader(root, layers=layout.layers, batch_tokens=batch_tokens))
    ordinals = [int(o) for batch in batches for o in batch.ordinals_B]
    return dict(zip(ordinals, TrainerSamples(batches, layout), strict=True))


def error_bound(codec: str, hidden_size: int) -> float:
    """The largest relative error of a state's length, as FORMAT.md section 7.2 states it, and of bfloat16 after it."""
    if codec == "f32":
        return 1e-6
    if codec == "fp8":
        return 2**-4 + 2**-8
    step = max(STEP_OF_RMS.get(codec, 0.0) / 2, math.sqrt(hidden_size) / 254 if codec in STEP_OF_RMS else 0.0)
    return step * (1 + 2**-7) + 2**-8


@settings(max_examples=20)
@given(codec=st.sampled_from(CODECS), trainer=st.sampled_from(sorted(STATES)), batch_tokens=st.integers(1, 60),
       seed=st.integers(0, 5), layers=st.sets(st.integers(1, 5), min_size=3, max_size=3))
def test_states_are_those_of_the_trace_within_the_error_of_their_codec(codec, trainer, batch_tokens, seed, layers
                                                                       ) -> None:
    shape = Shape(num_layers=6, layers=(*sorted(layers), 6), hidden_codec=codec, final_norm_eps=1e-5, hidden_size=12,
                  prompts_per_shard=2)
    aux_key, last_key = STATES[trainer]
    dtype = "f32" if codec == "f32" and trainer != "deepspec" else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        normed_dataset(folder, shape, 3, seed)
        found = samples(Path(folder), trainer, ExportOptions(dtype=dtype, seq_length=16), batch_tokens)
    bound = error_bound(codec, 12) + (2**-8 if dtype == "bf16" else 0)
    for ordinal, sample in found.items():
        trace = random_trace(ordinal, shape, seed)
        length = min(trace.num_tokens - 1, 16)
        for key, stored in ((aux_key, sorted(layers)), (last_key, [6])):
            if key is not None:
                states_SLH = sample[key].flatten(0, -2)[:length].float().view(length, len(stored), 12)
                expected_SLH = torch.from_numpy(np.stack([trace.hidden[n] for n in stored], 1))[:length]
                error_SL = (states_SLH - expected_SLH).norm(dim=2) / expected_SLH.norm(dim=2)
                assert error_SL.max() <= bound


@settings(max_examples=20)
@given(bits=st.integers(5, 24), top_k=st.integers(1, 12), asked=st.integers(1, 12), batch_tokens=st.integers(1, 60),
       seed=st.integers(0, 5))
def test_heads_are_those_of_the_trace_within_their_rounding(bits, top_k, asked, batch_tokens, seed) -> None:
    shape = Shape(layers=(), top_k=top_k, logprob_bits=bits, prompts_per_shard=2)
    asked = min(asked, top_k)
    with tempfile.TemporaryDirectory() as folder:
        normed_dataset(folder, shape, 3, seed)
        options = ExportOptions(top_k=asked)
        raw, normalised = (samples(Path(folder), t, options, batch_tokens) for t in ("distillkit", "axolotl"))
    for ordinal in range(3):
        trace = random_trace(ordinal, shape, seed)
        positions, exact = trace.positions_R, trace.topk_logprobs_N.reshape(-1, top_k)
        ids = trace.topk_ids_N.reshape(-1, top_k)[:, :asked]
        assert raw[ordinal]["token_ids"][positions].tolist() == ids.tolist()
        # The reader shifts a rounded head as a whole, so that it and the tail add up to one: twice the rounding.
        np.testing.assert_allclose(raw[ordinal]["top_values"][positions], exact[:, :asked],
                                   atol=2 * 2.0**-bits * np.abs(exact).max() + 1e-5)
        held = normalised[ordinal]["target_logprobs"][positions]
        assert normalised[ordinal]["target_token_ids"][positions].tolist() == ids.tolist()
        np.testing.assert_allclose(held.exp().sum(1), 1, atol=1e-5)
        renormalised = raw[ordinal]["top_values"][positions].log_softmax(1)
        torch.testing.assert_close(held, renormalised, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    normed_dataset(folder)
    return folder


@pytest.mark.parametrize("trainer", [t for t in LAYOUTS if t != "distillkit"])
def test_nothing_is_trained_on_that_the_dataset_does_not_hold(root, trainer) -> None:
    """Wherever a trainer's mask is set, what its loss reads there is stored: a state, or a row."""
    for ordinal, sample in samples(root, trainer, ExportOptions(seq_length=16), 64).items():
        trace = random_trace(ordinal, SHAPE)
        stored = trace.num_tokens - 1
        if trainer == "axolotl":
            assert set(sample["target_mask"].any(1).nonzero()[:, 0].tolist()) == set(trace.positions_R.tolist())
        elif trainer == "automodel-eagle3":
            compared = sample["position_mask"][:, 0].nonzero()[:, 0] + 1
            assert set(compared.tolist()) <= set(trace.positions_R.tolist())
        elif trainer == "automodel-dspark":
            # A label at t is compared with the state of t - 1.
            assert all(t - 1 < stored for t in sample["loss_mask"].nonzero()[:, 0].tolist())
        else:
            assert sample["loss_mask"].shape[-1] == stored


def test_ranks_share_the_samples_and_padding_batches_yield_none(root) -> None:
    layout = trainer_layout(root, "specforge")
    seen = []
    for rank in range(3):
        reader = ShardReader(root, layers=layout.layers, batch_tokens=30, dp_rank=rank, dp_world=3)
        seen += [tuple(s["input_ids"].tolist()) for s in TrainerSamples(reader, layout)]
    assert sorted(seen) == sorted(tuple(random_trace(i, SHAPE).token_ids_T[:-1].tolist()) for i in range(PROMPTS))
    assert list(batch_records(padding(layout.layers, require_run(open_root(root))))) == []


def test_a_data_loader_batches_adapted_samples_with_the_trainers_own_collation(root) -> None:
    layout = trainer_layout(root, "angelslim")
    reader = ShardReader(root, layers=layout.layers, batch_tokens=30)

    def collate(items: list[dict[str, torch.Tensor]]) -> list[int]:
        return [item["input_ids"].shape[1] for item in items]

    lengths = list(DataLoader(TrainerSamples(reader, layout), batch_size=4, collate_fn=collate))
    assert [len(batch) for batch in lengths] == [4, 4, 2]
    assert sum(map(sum, lengths)) == sum(random_trace(i, SHAPE).num_tokens - 1 for i in range(PROMPTS))


def test_an_adapter_takes_any_iterable_of_batches(root) -> None:
    layout = trainer_layout(root, "axolotl")
    batches: list[Batch] = list(ShardReader(root, batch_tokens=10**6))
    assert len(batches) == 1
    assert len(list(TrainerSamples(batches, layout))) == PROMPTS
