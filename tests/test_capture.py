"""Stored rows against Hugging Face transformers on the same token ids, through the whole real path.

Catches rows shifted by one, a wrong layer numbering, a norm on the wrong side, rows lost or mixed up between requests
of a batch, and a capture that is less exact than it says. Shapes: T tokens, R rows, K head, V vocabulary, H hidden.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import LAYERS, prompt_records, stored_traces, succeed, write_corpus

from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.store.trace import Trace

pytestmark = pytest.mark.engine

RELATIVE = 2.0**-7  # of a log-probability: half a unit of its seventh significant bit


@dataclass(frozen=True)
class Reference:
    """Transformers on one trace: log-probabilities of every position, and the residual stream by layer (last is before
    the final norm)."""

    logprobs_TV: torch.Tensor
    hidden: dict[int, torch.Tensor]


def tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own: arrays read from Parquet are views that must not be written."""
    return torch.from_numpy(array.copy())


def reference(model: torch.nn.Module, trace: Trace) -> Reference:
    states: dict[int, torch.Tensor] = {}
    hook = model.model.norm.register_forward_pre_hook(lambda _m, args: states.update({30: args[0][0]}))
    with torch.inference_mode():
        out = model(tensor(trace.token_ids_T).long()[None], output_hidden_states=True)
    hook.remove()
    states |= {n: out.hidden_states[n][0] for n in LAYERS[:-1]}
    return Reference(out.logits[0].float().log_softmax(-1), {n: h.float() for n, h in states.items()})


def head_errors(trace: Trace, logprobs_TV: torch.Tensor) -> np.ndarray:
    """|stored log-probability - reference| of every head entry."""
    rows_N = np.repeat(trace.positions_R, trace.topk_counts_R)
    wanted_N = logprobs_TV[tensor(rows_N), tensor(trace.topk_ids_N).long()]
    return np.abs(trace.topk_logprobs_N - wanted_N.numpy())


def top1(trace: Trace) -> np.ndarray:
    starts_R = np.concatenate([[0], np.cumsum(trace.topk_counts_R)[:-1]])
    return trace.topk_ids_N[starts_R]


def load(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(materialise_smollm2(), dtype=dtype).eval()


@pytest.fixture(scope="module")
def exact_model() -> torch.nn.Module:
    return load(torch.float32)


def both(generated: Path, scored: Path) -> Iterator[tuple[Trace, float]]:
    yield from ((trace, RELATIVE) for trace in stored_traces(generated))
    yield from ((trace, 0.0) for trace in stored_traces(scored))


def test_head_entries_of_a_float32_engine_equal_transformers(generated, scored, exact_model) -> None:
    for trace, rounding in both(generated, scored):
        wanted = reference(exact_model, trace).logprobs_TV
        assert (head_errors(trace, wanted) <= 2e-4 + rounding * np.abs(trace.topk_logprobs_N) * 1.01).all()
        assert (top1(trace) == wanted[tensor(trace.positions_R)].argmax(-1).numpy()).all()


def test_logsumexp_tail_mass_and_next_logprob_equal_transformers(generated, scored, exact_model) -> None:
    for trace, _ in both(generated, scored):
        logprobs_RV = reference(exact_model, trace).logprobs_TV[tensor(trace.positions_R)]
        next_R = trace.token_ids_T[trace.positions_R + 1]
        head_R = logprobs_RV.topk(32).values.exp().sum(-1).numpy()
        np.testing.assert_allclose(trace.next_logprob_R, logprobs_RV[np.arange(len(next_R)), next_R], atol=3e-4,
                                   rtol=2.0**-15)
        np.testing.assert_allclose(trace.tail_mass_R, 1 - head_R, atol=1e-4)


def test_hidden_states_of_a_float32_engine_equal_transformers(generated, scored, exact_model) -> None:
    for trace, _ in both(generated, scored):
        wanted = reference(exact_model, trace)
        for layer in LAYERS:
            hidden_TH = wanted.hidden[layer][:-1].numpy()
            error = np.linalg.norm(trace.hidden[layer] - hidden_TH) / np.linalg.norm(hidden_TH)
            assert error <= 1e-4, f"layer {layer}"


def test_rows_shifted_by_one_either_way_would_be_noticed(generated, exact_model) -> None:
    for trace in stored_traces(generated):
        wanted = reference(exact_model, trace)
        agreement = {}
        for shift in (-1, 0, 1):
            rows_R = np.clip(trace.positions_R + shift, 0, trace.num_tokens - 1)
            agreement[shift] = (top1(trace) == wanted.logprobs_TV[tensor(rows_R)].argmax(-1).numpy()).mean()
        assert agreement[0] == 1
        assert max(agreement[-1], agreement[1]) < 0.5
        hidden_TH = wanted.hidden[15][:-1].numpy()
        stored_TH = trace.hidden[15]
        assert np.linalg.norm(stored_TH[1:] - hidden_TH[:-1]) > 0.1 * np.linalg.norm(hidden_TH)
        assert np.linalg.norm(stored_TH[:-1] - hidden_TH[1:]) > 0.1 * np.linalg.norm(hidden_TH)


def test_tail_samples_lie_outside_the_head_and_carry_their_true_logprob(generated, exact_model) -> None:
    for trace in stored_traces(generated):
        logprobs_TV = reference(exact_model, trace).logprobs_TV
        assert (trace.tail_counts_R == 8).all()
        rows_N = np.repeat(trace.positions_R, trace.tail_counts_R)
        wanted_N = logprobs_TV[tensor(rows_N), tensor(trace.tail_ids_N).long()].numpy()
        assert (np.abs(trace.tail_logprobs_N - wanted_N) <= 3e-4 + RELATIVE * np.abs(wanted_N)).all()
        for r in range(trace.num_rows):
            head = trace.topk_ids_N.reshape(-1, 32)[r]
            assert not set(head) & set(trace.tail_ids_N.reshape(-1, 8)[r])


def test_sampled_tail_alpha_is_within_two_hundredths_of_the_dense_alpha(generated, exact_model) -> None:
    torch.manual_seed(0)
    dense, sparse = [], []
    for trace in stored_traces(generated):
        logp_RV = reference(exact_model, trace).logprobs_TV[tensor(trace.positions_R)]
        logq_RV = (logp_RV * 0.9 + torch.randn_like(logp_RV) * 0.8).log_softmax(-1)
        dense.append(torch.minimum(logp_RV, logq_RV).exp().sum(-1))
        ids_RK = tensor(trace.topk_ids_N).long().reshape(-1, 32)
        ids_RM = tensor(trace.tail_ids_N).long().reshape(-1, 8)
        head_R = torch.minimum(tensor(trace.topk_logprobs_N).reshape(-1, 32), logq_RV.gather(1, ids_RK))
        ratio_RM = logq_RV.gather(1, ids_RM) - tensor(trace.tail_logprobs_N).reshape(-1, 8)
        sparse.append(head_R.exp().sum(-1) + tensor(trace.tail_mass_R) * ratio_RM.exp().clamp(max=1).mean(-1))
    assert abs(torch.cat(sparse).mean() - torch.cat(dense).mean()) <= 0.02


def test_a_bf16_engine_is_as_close_to_float32_as_transformers_in_bf16(tmp_path, exact_model) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records())
    succeed("generate", "--target", "smollm2-135m", "--corpus", corpus, "--out", tmp_path / "out", "--set",
            "dtype=bfloat16", "--layers", ",".join(map(str, LAYERS)), "--hidden-codec", "bf16-split", "--set",
            "sampling.max_tokens=24", "--set", "capture.logprob_bits=24")
    rough = load(torch.bfloat16)
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    masses: list[np.ndarray] = []
    states: dict[int, list[tuple[float, float]]] = {n: [] for n in LAYERS}
    for trace in stored_traces(tmp_path / "out"):
        exact, bf16 = reference(exact_model, trace), reference(rough, trace)
        rows_N = tensor(np.repeat(trace.positions_R, trace.topk_counts_R))
        ids_N = tensor(trace.topk_ids_N).long()
        ours.append(head_errors(trace, exact.logprobs_TV))
        theirs.append((bf16.logprobs_TV - exact.logprobs_TV)[rows_N, ids_N].abs().numpy())
        logp_RV = exact.logprobs_TV[tensor(trace.positions_R)]
        masses.append(trace.tail_mass_R - (1 - logp_RV.topk(32).values.exp().sum(-1).numpy()))
        for n in LAYERS:
            exact_TH = exact.hidden[n][:-1].numpy()
            states[n].append((float(np.linalg.norm(trace.hidden[n] - exact_TH)),
                              float(np.linalg.norm(bf16.hidden[n][:-1].numpy() - exact_TH))))
    mean_ours, mean_theirs = np.concatenate(ours).mean(), np.concatenate(theirs).mean()
    print(f"mean |d logprob|: captured {mean_ours:.4f}, transformers bf16 {mean_theirs:.4f}; "
          f"mean |d tail mass| {np.abs(np.concatenate(masses)).mean():.4f}")
    assert mean_ours <= 1.25 * mean_theirs
    assert np.abs(np.concatenate(masses)).mean() <= 0.015
    for n, errors in states.items():
        assert sum(e[0] for e in errors) <= 1.25 * sum(e[1] for e in errors) + 1e-6, f"layer {n}"


def test_more_prompt_tokens_than_one_step_takes_are_sampled_and_captured(tmp_path: Path) -> None:
    # 44 prompts of about 110 tokens are more than the 4096 tokens of a step.
    prompts = [f"{i}: " + "count the sheep " * 24 for i in range(44)]
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records(prompts))
    succeed("generate", "--target", "smollm2-135m", "--corpus", corpus, "--out", tmp_path / "out", "--layers", "none",
            "--set", "sampling.max_tokens=2", "--set", "max_model_len=128")
    traces = list(stored_traces(tmp_path / "out"))
    assert len(traces) == len(prompts)
    assert sum(int(t.positions_R[0]) + 1 for t in traces) > 4096


def test_an_adaptive_head_and_rotated_states_agree_with_transformers_too(tmp_path: Path, exact_model) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records())
    succeed("generate", "--target", "smollm2-135m", "--corpus", corpus, "--out", tmp_path / "out", "--layers",
            ",".join(map(str, LAYERS)), "--hidden-codec", "q6", "--set", "sampling.max_tokens=24", "--set",
            "capture.coverage=0.9", "--set", "capture.top_k_max=40")
    sizes = []
    for trace in stored_traces(tmp_path / "out"):
        wanted = reference(exact_model, trace)
        mass_RK = wanted.logprobs_TV[tensor(trace.positions_R)].exp().topk(40).values.double().cumsum(1).numpy()
        needed_R = np.minimum((mass_RK < 0.9).sum(1) + 1, 40)
        assert (np.abs(trace.topk_counts_R - needed_R) <= (np.abs(mass_RK - 0.9).min(1) < 1e-4)).all()
        held_R = np.take_along_axis(mass_RK, trace.topk_counts_R[:, None].astype(np.int64) - 1, 1)[:, 0]
        np.testing.assert_allclose(trace.tail_mass_R, 1 - held_R, atol=1e-4)
        assert (head_errors(trace, wanted.logprobs_TV) <= 2e-4 + RELATIVE * np.abs(trace.topk_logprobs_N) * 1.01).all()
        for layer in LAYERS:
            hidden_TH = wanted.hidden[layer][:-1].numpy()
            error_T = np.linalg.norm(trace.hidden[layer] - hidden_TH, axis=1) / np.linalg.norm(hidden_TH, axis=1)
            assert error_T.max() < 0.04, f"layer {layer}"
        sizes += trace.topk_counts_R.tolist()
    assert min(sizes) < 5
    assert max(sizes) == 40
    hidden = next((tmp_path / "out" / "_manifest").rglob("*.json")).read_text()
    assert [e["layer"] for e in json.loads(hidden)["info"]["measured"]["hidden"]] == list(LAYERS)
    assert all(0.02 < e["mean"] < 0.035 for e in json.loads(hidden)["info"]["measured"]["hidden"])
