"""Stored rows of every model family against Hugging Face transformers, on tiny checkpoints of the real classes.

Catches a model of vLLM that numbers or delivers its layers in its own way, a head that is not where the others have it,
a layer for multi-token prediction taken for one of the target's, and a family that the engine computes wrongly.
Float32 on both sides, where two right implementations differ by 2e-5. Shapes: T tokens, R rows, V vocabulary, H hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import command, prompt_records, stored_traces, succeed, write_corpus
from safetensors import safe_open
from tiny_targets import FAMILIES, HIDDEN, VOCAB, write_deepseek_v3, write_gpt_oss_mxfp4
from tiny_targets import LAYERS as NUM_LAYERS

from distill_pipe.produce.targets import resolve_target
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.trace import Trace

pytestmark = pytest.mark.engine

TOP_K = 32
# vLLM's DeepSeek-V3 has no state before its first layer.
WITHOUT_EMBEDDINGS = ("deepseek-v3",)
# Given responses are all prefill, as prompts are; these compute it in a way of their own.
SCORED = ("gpt-oss", "deepseek-v3")
SETTINGS = ("--hidden-codec", "f32", "--set", "capture.logprob_bits=24", "--set", "dtype=float32", "--set",
            "max_model_len=192", "--set", "engine.max_num_seqs=4", "--set", "prompts_per_shard=4")
GENERATE = ("--set", "sampling.max_tokens=16")
SCORE = ("--responses", "corpus")
CONVERSATIONS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
                  {"role": "user", "content": "Another one, please."},
                  {"role": "assistant", "content": "Green, like the moss on an old wall."}]},
    {"prompt": "Count to ten.", "completion": "One, two, three, four, five, six, seven, eight, nine, ten."},
]


@dataclass(frozen=True)
class Family:
    """A tiny target, the responses it wrote, and where it scored given ones."""

    name: str
    folder: Path
    generated: Path
    scored: Path
    model: torch.nn.Module

    def traces(self) -> Iterator[Trace]:
        yield from stored_traces(self.generated)
        if self.name in SCORED:
            yield from stored_traces(self.scored)


@dataclass(frozen=True)
class Reference:
    """Transformers on one trace; the last of the states is before the final norm."""

    logits_TV: torch.Tensor
    hidden: dict[int, torch.Tensor]


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    # Only the plain implementation of attention knows sinks.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def layers_of(name: str) -> tuple[int, ...]:
    return (1, 3, NUM_LAYERS) if name in WITHOUT_EMBEDDINGS else (0, 1, 3, NUM_LAYERS)


def generate(target: Path, out: Path, layers: tuple[int, ...], *extra: str) -> list[object]:
    """The command line that writes or scores responses of a tiny target."""
    records = CONVERSATIONS if "corpus" in extra else prompt_records()
    corpus = write_corpus(out.parent / f"{out.name}.jsonl", records)
    return ["generate", "--target", target, "--corpus", corpus, "--out", out, "--layers",
            ",".join(map(str, layers)), *SETTINGS, *extra]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    target = FAMILIES[request.param](folder / request.param)
    layers = layers_of(request.param)
    succeed(*generate(target, folder / "generated", layers, *GENERATE))
    if request.param in SCORED:
        succeed(*generate(target, folder / "scored", layers, *SCORE))
    return Family(request.param, target, folder / "generated", folder / "scored", load(target))


def reference(model: torch.nn.Module, trace: Trace) -> Reference:
    states: dict[int, torch.Tensor] = {}
    hook = model.model.norm.register_forward_pre_hook(lambda _m, args: states.update({NUM_LAYERS: args[0][0]}))
    with torch.inference_mode():
        out = model(torch.from_numpy(trace.token_ids_T.astype(np.int64))[None], output_hidden_states=True)
    hook.remove()
    return Reference(out.logits[0], dict(enumerate(out.hidden_states[:NUM_LAYERS])) | states)


def head_error(trace: Trace, logprobs_TV: torch.Tensor) -> float:
    """The largest |stored - reference| of the head's entries."""
    rows_N = torch.from_numpy(np.repeat(trace.positions_R, trace.topk_counts_R))
    wanted_N = logprobs_TV[rows_N, torch.from_numpy(trace.topk_ids_N.astype(np.int64))]
    return float(np.abs(trace.topk_logprobs_N - wanted_N.numpy()).max())


def test_head_and_scalars_of_a_family_equal_transformers(family) -> None:
    for trace in family.traces():
        logits_TV = reference(family.model, trace).logits_TV
        logprobs_RV = logits_TV.log_softmax(-1)[trace.positions_R]
        next_R = trace.token_ids_T[trace.positions_R + 1]
        assert head_error(trace, logits_TV.log_softmax(-1)) <= 2e-4
        np.testing.assert_allclose(trace.logsumexp_R, logits_TV[trace.positions_R].logsumexp(-1), atol=2e-4)
        np.testing.assert_allclose(trace.next_logprob_R, logprobs_RV[np.arange(len(next_R)), next_R], atol=2e-4)
        np.testing.assert_allclose(trace.tail_mass_R, 1 - logprobs_RV.topk(TOP_K).values.exp().sum(-1), atol=2e-4)
        assert (trace.topk_ids_N.reshape(-1, TOP_K)[:, 0] == logprobs_RV.argmax(-1).numpy()).all()


def test_hidden_states_of_a_family_equal_transformers(family) -> None:
    for trace in family.traces():
        wanted = reference(family.model, trace).hidden
        assert tuple(trace.hidden) == layers_of(family.name)
        for layer, stored_TH in trace.hidden.items():
            wanted_TH = wanted[layer].reshape(-1, HIDDEN)[:-1].numpy()
            error_T = np.linalg.norm(stored_TH - wanted_TH, axis=1) / np.linalg.norm(wanted_TH, axis=1)
            assert error_T.max() <= 1e-4, f"layer {layer}"


def test_the_last_state_final_norm_and_head_of_a_family_give_its_logits(family) -> None:
    weight_H = torch.from_numpy(read_final_norm(LocalRoot(family.generated), HIDDEN).copy())
    assert torch.equal(weight_H, family.model.model.norm.weight)
    eps = resolve_target(str(family.folder)).spec.final_norm_eps
    for trace in stored_traces(family.generated):
        last_RH = torch.from_numpy(trace.hidden[NUM_LAYERS][trace.positions_R])
        logits_RV = torch.nn.functional.rms_norm(last_RH, (HIDDEN,), weight_H, eps) @ family.model.lm_head.weight.T
        np.testing.assert_allclose(trace.logsumexp_R, logits_RV.logsumexp(-1).detach(), atol=2e-4)


def test_the_facts_of_a_family_come_from_its_config(family) -> None:
    target = resolve_target(str(family.folder))
    spec, config = target.spec, family.model.config
    assert spec.architecture == type(family.model).__name__
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (VOCAB, HIDDEN, NUM_LAYERS)
    assert (spec.final_norm_eps, spec.dtype) == (config.rms_norm_eps, "float32")
    assert target.default_layers == (2, NUM_LAYERS)


def test_a_family_passes_the_audit(family) -> None:
    done = succeed("audit", family.generated, "--traces", 4, "--target", family.folder)
    assert "4 traces" in done.stdout


def test_what_sets_a_family_apart_reaches_the_stored_rows(family) -> None:
    """Without it transformers gives other rows: so the tests above would see an engine that leaves it out."""
    apart = {"llama": "k_proj.weight", "qwen3": "k_norm.weight", "qwen3-moe": "mlp.gate.weight", "gpt-oss": "sinks",
             "deepseek-v3": "e_score_correction_bias"}
    model = load(family.folder)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(apart[family.name]):
                tensor.copy_(-tensor)
    trace = next(stored_traces(family.generated))
    assert head_error(trace, reference(model, trace).logits_TV.log_softmax(-1)) > 0.01


def test_a_layer_for_multi_token_prediction_is_not_one_of_the_targets(tmp_path: Path) -> None:
    folder = write_deepseek_v3(tmp_path / "target")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert f"model.layers.{NUM_LAYERS}.eh_proj.weight" in weights.keys()  # noqa: SIM118 - not a mapping
    done = command(*generate(folder, tmp_path / "out", (NUM_LAYERS + 1,), *GENERATE))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_embeddings_are_refused_where_the_model_cannot_deliver_them(tmp_path: Path) -> None:
    done = command(*generate(write_deepseek_v3(tmp_path / "target"), tmp_path / "out", (0, 3), *GENERATE))
    refused(done, tmp_path / "out", "DeepseekV3ForCausalLM", "layer 0")


@pytest.mark.parametrize(("dtype", "messages"), [
    ("float32", ("torch.float32 is not supported for quantization method gpt_oss_mxfp4",)),
    ("bfloat16", ("No MXFP4 MoE backend supports", "kernel does not support current device cpu")),
])
def test_packed_mxfp4_experts_are_refused_in_one_line_where_no_kernel_takes_them(tmp_path, dtype, messages) -> None:
    if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
        pytest.skip("this machine has the kernel")
    done = command(*generate(write_gpt_oss_mxfp4(tmp_path / "target"), tmp_path / "out", (1, 3), *GENERATE, "--set",
                             f"dtype={dtype}"))
    refused(done, tmp_path / "out", *messages)


def refused(done, out: Path, *messages: str) -> None:
    """The engine did not start: one line says why, and no row was stored."""
    assert done.returncode == 7, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(message in line for message in messages), line
    assert "Traceback" not in done.stderr
    stored = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert stored == {"README.md", "run.json", next(name for name in stored if name.startswith("plan/"))}
