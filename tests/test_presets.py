"""Catches a preset with wrong facts, a layout that cannot hold its target, and an argument that vLLM does not know.

The sizes that presets are held to here are those their makers publish; the class limits are vLLM's own attributes.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import command, succeed
from test_targets import CONFIG, fake_target

from distill_pipe.errors import UsageError
from distill_pipe.produce.gpus import GPUS, parse_gpus
from distill_pipe.produce.job import load_job
from distill_pipe.produce.layouts import choose_layout
from distill_pipe.produce.memory import Device, Load, plan_memory
from distill_pipe.produce.model_config import ModelConfig, count_parameters
from distill_pipe.produce.preset import FOLDER_VARIABLE, Layout, Preset, load_preset, preset_names
from distill_pipe.produce.targets import preset_target, resolve_target
from distill_pipe.produce.vllm_engine import engine_arguments
from distill_pipe.store.spec import CaptureSpec, CorpusSpec, EngineSpec, RunSpec, SamplingSpec

# Billions of parameters, all and for each token, as the model cards have them.
PUBLISHED = {"llama-3.1-8b": (8.03, 8.0), "llama-3.3-70b": (70.6, 70.6), "gpt-oss-20b": (20.9, 3.6),
             "gpt-oss-120b": (116.8, 5.1), "qwen3-235b": (235, 22), "qwen3-8b": (8.2, 8.2),
             "qwen3-30b-a3b": (30.5, 3.3), "deepseek-v3": (671, 37), "deepseek-r1": (671, 37),
             "kimi-k2": (1026, 32), "glm-4.5": (353, 32),
             "smollm2-135m": (0.1345, 0.1345)}
NEEDED = {"corpus": "c.jsonl", "out": "out"}


def preset(name: str) -> Preset:
    found = load_preset(name)
    assert found is not None
    return found


def facts(name: str) -> ModelConfig:
    config = preset(name).config
    assert config is not None
    return config


def spec_of(name: str, layers: tuple[int, ...] | None = None) -> RunSpec:
    target = preset_target(name)
    assert target is not None
    return RunSpec(target=target.spec, corpus=CorpusSpec(files=(), prompts=1000), responses="target",
                   sampling=SamplingSpec(), prompts_per_shard=64,
                   capture=CaptureSpec(layers=target.default_layers if layers is None else layers, hidden_codec="q6"),
                   engine=EngineSpec(name="none", version="0", max_model_len=target.default_len))


def test_the_targets_of_the_paper_and_some_more_are_known() -> None:
    assert set(preset_names()) >= set(PUBLISHED)
    assert load_preset("no-such-target") is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_facts_of_a_preset_make_the_published_number_of_parameters(name: str) -> None:
    counted = count_parameters(facts(name))
    total, active = PUBLISHED[name]
    assert counted.total / 1e9 == pytest.approx(total, rel=0.005)
    # Makers round, and count the embeddings with the parameters at work or leave them out.
    assert counted.active / 1e9 == pytest.approx(active, rel=0.1)


# Of DeepSeek-V3's 688.6 GB, 15.3 are its layer for multi-token prediction with another embedding and head.
@pytest.mark.parametrize(("name", "gigabytes"), [("gpt-oss-120b", 65.2), ("gpt-oss-20b", 13.8), ("deepseek-v3", 673.3)])
def test_quantised_weights_have_the_size_of_the_published_files(name: str, gigabytes: float) -> None:
    found = preset(name)
    assert count_parameters(facts(name)).weight_bytes("bfloat16", found.quantization) / 1e9 == pytest.approx(
        gigabytes, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_pins_what_it_stands_for_and_says_under_what_licence(name: str) -> None:
    found = preset(name)
    assert found.licence
    assert found.chat_template
    assert found.model.startswith("pip:") or re.fullmatch("[0-9a-f]{40}", found.revision or "")
    assert set(found.layouts) == set(GPUS)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layout_holds_weights_capture_and_a_batch(name: str, gpu: str) -> None:
    layout, target = preset(name).layouts[gpu], preset_target(name)
    assert target is not None
    job = load_job(None, [], {**NEEDED, "target": name, "gpus": f"{layout.devices}x{gpu}"})
    device = Device(kind="gpu", bytes=GPUS[gpu].bytes, source=gpu)
    memory = plan_memory(target, spec_of(name), Load(1500.0, 1000.0, 256), 1, device, job.engine)
    assert memory.devices_per_engine == layout.devices
    assert (memory.fitting_sequences or 0) >= 64
    heads = facts(name).num_attention_heads or 0
    assert heads % layout.tp == 0
    assert layout.ep <= bool(facts(name).experts)


def test_the_layout_of_the_gpus_goes_under_the_job() -> None:
    job = load_job(None, [], {**NEEDED, "target": "deepseek-v3", "gpus": "32xH100"})
    engine = job.engine
    assert (engine.tensor_parallel_size, engine.enable_expert_parallel, job.workers) == (16, True, 2)
    assert engine.distributed_executor_backend == "ray", "an engine on two machines"
    assert (job.sampling.max_tokens, engine.max_num_seqs) == (4096, 256)
    own = load_job(None, ["engine.tensor_parallel_size=8", "sampling.max_tokens=7", "workers=3"],
                   {**NEEDED, "target": "deepseek-v3", "gpus": "32xH200"})
    assert (own.engine.tensor_parallel_size, own.engine.enable_expert_parallel, own.workers) == (8, False, 3)
    assert (own.sampling.max_tokens, own.sampling.temperature) == (7, 1.0)


@pytest.mark.parametrize(("name", "gpus", "message"), [
    ("deepseek-v3", "4xA100-80", (r"626\.8 GiB of fp8 weights are 156\.7 GiB on each, which has 80\.0; it takes "
                                  r"16xA100-80: tensor parallel 16, expert parallel, on 2 machines")),
    ("llama-3.3-70b", "1xh200", r"131\.4 GiB of bfloat16 weights .* it takes 2xH200: tensor parallel 2$"),
    ("owner/model", "8xH200", "no layout of owner/model on H200 is known: set engine.tensor_parallel_size"),
    ("llama-3.1-8b", "8xV100", "the type is not one of A100-80, H100-80, H200, B200"),
    ("llama-3.1-8b", "H100", "write a number and a type"), ("llama-3.1-8b", "0xH100", "write a number and a type")])
def test_gpus_that_are_too_few_or_unknown_are_refused(name: str, gpus: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_job(None, [], {**NEEDED, "target": name, "gpus": gpus})


def test_an_engine_larger_than_the_gpus_at_hand_is_refused() -> None:
    with pytest.raises(UsageError, match="an engine of 8 devices does not fit 4xH200"):
        load_job(None, ["engine.tensor_parallel_size=8"], {**NEEDED, "target": "qwen3-8b", "gpus": "4xH200"})


def test_gpus_are_read_by_several_names() -> None:
    assert parse_gpus("4xa100").gpu == parse_gpus("4 x A100-80").gpu == GPUS["A100-80"]
    assert choose_layout("kimi-k2", preset("kimi-k2"), parse_gpus("16xH200")) == Layout(tp=16, ep=True)


def test_presets_of_ones_own_go_over_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("model: /nowhere\nlayers: last\n")
    (tmp_path / "qwen3-8b.yaml").write_text("model: me/my-qwen\n")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert {"mine", "qwen3-8b", "kimi-k2"} <= set(preset_names())
    assert (preset("mine").layers, preset("qwen3-8b").model) == ("last", "me/my-qwen")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="gone: there is no such folder"):
        preset_names()


@pytest.mark.parametrize(("text", "message"), [
    ("model: [", "is not a preset"), ("licence: MIT", "missing required field `model`"),
    ("model: a/b\nlayer: last", "unknown field `layer`"), ("model: a/b\nengine: {tp: 2}", "unknown field `tp`"),
    ("model: a/b\nsampling: {temperature: -1}", "temperature"),
    ("model: a/b\nlayouts: {T4: {}}", "layouts for T4, known")])
def test_a_file_that_is_no_preset_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str,
                                                     message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=rf"mine\.yaml.*{message}"):
        load_preset("mine")


def own_preset(folder: Path, monkeypatch: pytest.MonkeyPatch, model: Path, **fields: object) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": str(model), **fields}))
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))


def test_a_model_that_is_not_what_its_preset_says_is_refused_naming_the_fields(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_target(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    same = {key: CONFIG[key] for key in ("architectures", "hidden_size", "vocab_size")}
    own_preset(tmp_path, monkeypatch, model, quantization="fp8", config=same)
    assert resolve_target("mine").quantization == "fp8"
    own_preset(tmp_path, monkeypatch, model, config=same | {"hidden_size": 65, "kv_lora_rank": 512})
    with pytest.raises(UsageError) as refusal:
        resolve_target("mine")
    for part in ("hidden_size: the preset has 65, config.json 64", "kv_lora_rank: the preset has 512, config.json None",
                 "quantization: the preset has None, config.json 'fp8'"):
        assert part in str(refusal.value)
    assert "vocab_size" not in str(refusal.value)


def test_the_default_context_of_a_preset_is_not_the_most_that_a_job_may_ask_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_preset(tmp_path, monkeypatch, fake_target(tmp_path / "model"), max_model_len=100)
    target = resolve_target("mine")
    assert (target.default_len, target.max_model_len) == (100, 512)


@pytest.mark.parametrize(("settings", "message"), [
    ([], "vLLM delivers no hidden states of LlamaForCausalLM; use --layers none"),
    (["capture.layers=last"], "delivers no hidden states")])
def test_what_the_class_cannot_deliver_is_refused_before_an_engine_starts(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str) -> None:
    from distill_pipe.produce.generate import prepare

    own_preset(tmp_path, monkeypatch, fake_target(tmp_path / "model"), limits={"states": False})
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"prompt": "a"}\n')
    given = {"target": "mine", "corpus": str(corpus), "out": str(tmp_path / "out")}
    with pytest.raises(UsageError, match=message):
        prepare(load_job(None, settings, given))
    assert prepare(load_job(None, ["capture.layers=none"], given))[1].capture.layers == ()
    own_preset(tmp_path, monkeypatch, tmp_path / "model", limits={"pipelined_states": False, "embeddings": False})
    with pytest.raises(UsageError, match="layer 0, the embeddings"):
        prepare(load_job(None, ["capture.layers=[0, 3]"], given))
    with pytest.raises(UsageError, match="between pipeline stages"):
        prepare(load_job(None, ["engine.pipeline_parallel_size=2"], given))


def test_list_and_show_print_every_preset_and_all_of_one() -> None:
    listed = succeed("targets", "list").stdout
    assert all(name in listed for name in PUBLISHED)
    shown = json.loads(succeed("targets", "show", "deepseek-v3", "--json").stdout)
    assert (shown["eagle3_layers"], shown["mtp_layers"]) == ([2, 30, 58, 61], [61])
    assert shown["preset"]["layouts"]["H200"] == {"tp": 8, "pp": 1, "ep": True}
    text = succeed("targets", "show", "llama-3.1-8b").stdout
    assert "gated" in text
    assert "Llama 3.1 Community License" in text
    unknown = command("targets", "show", "nothing")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: unknown target 'nothing'; known are deepseek-r1, ")


@pytest.mark.engine
@pytest.mark.parametrize("check", ["check_engine_arguments", "check_class_limits"])
def test_vllm_takes_what_presets_say_and_its_classes_have_the_limits_they_name(check: str) -> None:
    # In a process of its own: what other tests imported or set changes what vLLM does when it is imported.
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    path = os.pathsep.join([str(Path(__file__).parent), clean.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", f"import test_presets; test_presets.{check}()"], capture_output=True,
                          text=True, timeout=500, env=clean | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-4000:]


def check_engine_arguments() -> None:
    from vllm.engine.arg_utils import EngineArgs

    for name in PUBLISHED:
        found = preset(name)
        if found.model.startswith("pip:"):
            continue  # the engine is given its folder, as in every test that runs it
        for gpu, layout in found.layouts.items():
            job = load_job(None, [], {**NEEDED, "target": name, "gpus": f"{layout.devices}x{gpu}"})
            arguments = EngineArgs(**engine_arguments(found.model, found.revision, spec_of(name), job.engine, False))
            assert (arguments.model, arguments.revision) == (found.model, found.revision)
            assert arguments.tensor_parallel_size * arguments.pipeline_parallel_size == layout.devices
            assert (arguments.max_num_seqs, arguments.dtype) == (job.engine.max_num_seqs, spec_of(name).target.dtype)
            assert arguments.worker_cls.endswith("CaptureGPUWorker")


def check_class_limits() -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    for name in PUBLISHED:
        architecture, limits = facts(name).architectures[0], preset(name).limits
        module_name, class_name = _TEXT_GENERATION_MODELS[architecture]
        module = importlib.import_module(f"vllm.model_executor.models.{module_name}")
        states = supports_eagle3(getattr(module, class_name))
        inner: Any = getattr(module, class_name.replace("ForCausalLM", "Model").replace("DeepseekV3", "DeepseekV2"))
        pipelined = states and getattr(inner, "supports_aux_hidden_states_over_pp", False)
        assert (limits.states, limits.pipelined_states) == (states, pipelined), name
        assert limits.embeddings == (states and architecture != "DeepseekV3ForCausalLM"), name
