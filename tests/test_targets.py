"""Catches a target whose facts are guessed, whose identity misses a change, or whose absence ends in a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_pipe.errors import UsageError
from distill_pipe.produce.targets import resolve_target

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 12,
          "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
BLOCK = 64 << 10


def fake_target(folder: Path, weight_bytes: int = 3 * BLOCK, **config: object) -> Path:
    """A folder that looks like a model from outside; nobody loads its weights."""
    folder.mkdir(exist_ok=True)
    settings = {k: v for k, v in (CONFIG | config).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "model.safetensors").write_bytes(bytes(weight_bytes))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fake_target(tmp_path / "tiny-model")


def revision(folder: Path) -> str:
    return resolve_target(str(folder)).spec.revision


@pytest.mark.parametrize("name", ["no-such-target", "./no/such/folder", "/no/such/folder", "a/b/c", "../x", "a b/c"])
def test_an_unknown_target_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown target .*: give one of .*smollm2-135m.*, a local folder .*hub id"):
        resolve_target(name)


def test_the_facts_of_a_local_target_come_from_its_config(folder: Path) -> None:
    target = resolve_target(str(folder))
    spec = target.spec
    assert (spec.name, spec.architecture, spec.dtype) == ("tiny-model", "LlamaForCausalLM", "bfloat16")
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.final_norm_eps) == (320, 64, 12, 1e-6)
    assert (target.model, target.folder, target.revision) == (str(folder), folder, None)
    assert (target.max_model_len, target.default_len, target.default_layers) == (512, 512, (2, 6, 9, 12))
    assert spec.revision.startswith("sha256:")


def test_the_facts_of_a_multimodal_target_come_from_its_text_part(tmp_path: Path) -> None:
    text = {k: CONFIG[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
    folder = fake_target(tmp_path / "t", vocab_size=None, hidden_size=7, num_hidden_layers=None, text_config=text)
    spec = resolve_target(str(folder)).spec
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (320, 64, 12)


@pytest.mark.parametrize(("config", "dtype"), [
    ({"dtype": "float16"}, "float16"), ({"dtype": None, "torch_dtype": "torch.float32"}, "float32"),
    ({"dtype": None}, "bfloat16")])
def test_the_dtype_comes_from_the_config_unless_it_is_asked_for(tmp_path: Path, config: dict[str, object],
                                                                dtype: str) -> None:
    folder = fake_target(tmp_path / "t", **config)
    assert resolve_target(str(folder)).spec.dtype == dtype
    for asked in ("float16", "float32"):
        assert resolve_target(str(folder), dtype=asked).spec.dtype == asked
    with pytest.raises(UsageError, match="dtype 'float64' is not one of"):
        resolve_target(str(folder), dtype="float64")


def test_a_relative_folder_is_the_same_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve_target(folder.name).spec == resolve_target(str(folder)).spec
    assert resolve_target(folder.name).model == str(folder)


@pytest.mark.parametrize("weight_bytes", [1, 1000, BLOCK, 3 * BLOCK])
def test_any_changed_byte_of_weights_that_are_read_in_full_changes_the_identity(tmp_path: Path,
                                                                                weight_bytes: int) -> None:
    folder = fake_target(tmp_path / "t", weight_bytes)
    before = revision(folder)
    data = bytearray(weight_bytes)
    for at in {0, weight_bytes // 2, weight_bytes - 1}:
        changed = data.copy()
        changed[at] = 1
        (folder / "model.safetensors").write_bytes(changed)
        assert revision(folder) != before, at
    (folder / "model.safetensors").write_bytes(data)
    assert revision(folder) == before


def test_large_weights_are_sampled_at_both_ends_and_evenly_between(tmp_path: Path) -> None:
    size = 200 * BLOCK
    folder = fake_target(tmp_path / "t", size)
    before, path = revision(folder), folder / "model.safetensors"
    for block in (0, 1, 31, 62, 63):
        start = block * (size - BLOCK) // 63
        for at in (start, start + BLOCK - 1):
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(b"\1")
            assert revision(folder) != before, (block, at)
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(b"\0")
    assert revision(folder) == before


@pytest.mark.parametrize("change", [
    lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1})),
    lambda f: (f / "model.safetensors").write_bytes(bytes(3 * BLOCK + 1)),
    lambda f: (f / "model.safetensors").rename(f / "model-1.safetensors"),
    lambda f: (f / "more.safetensors").write_bytes(b"x")])
def test_a_changed_config_or_set_of_weight_files_changes_the_identity(folder: Path,
                                                                      change: Callable[[Path], None]) -> None:
    before = revision(folder)
    change(folder)
    assert revision(folder) != before


def test_the_identity_does_not_depend_on_the_place_or_on_other_files(folder: Path, tmp_path: Path) -> None:
    moved = fake_target(tmp_path / "moved")
    (moved / "README.md").write_text("hello")
    os.utime(moved / "model.safetensors", (1, 1))
    assert revision(moved) == revision(folder)


def test_tokenizer_and_template_are_part_of_the_identity(folder: Path) -> None:
    before = resolve_target(str(folder)).spec
    (folder / "tokenizer.json").write_text("{ }")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ other }}"}))
    after = resolve_target(str(folder)).spec
    assert after.tokenizer_sha256 != before.tokenizer_sha256
    assert None not in (before.chat_template_sha256, after.chat_template_sha256)
    assert after.chat_template_sha256 != before.chat_template_sha256
    (folder / "chat_template.jinja").write_text("{{ third }}")
    assert resolve_target(str(folder)).spec.chat_template_sha256 not in (before.chat_template_sha256,
                                                                         after.chat_template_sha256)


def test_a_target_without_a_template_has_none(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert resolve_target(str(folder)).spec.chat_template_sha256 is None


@pytest.mark.parametrize(("name", "message"), [
    ("config.json", "config.json cannot be read"), ("tokenizer.json", r"has no tokenizer \(looked for tokenizer\.json"),
    ("model.safetensors", r"has no weights \(\*\.safetensors\)")])
def test_a_missing_file_is_refused_and_named(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=rf"target {folder}:? {message}"):
        resolve_target(str(folder))


@pytest.mark.parametrize(("text", "message"), [
    ("{", "config.json cannot be read"), ("[]", "config.json is not an object"),
    ("{}", "lacks vocab_size, hidden_size, num_hidden_layers; is it a causal language model"),
    (json.dumps(CONFIG | {"vocab_size": "many"}), "lacks vocab_size"),
    (json.dumps(CONFIG | {"architectures": []}), "lacks architectures"),
    (json.dumps(CONFIG | {"rms_norm_eps": "small"}), "epsilon of the norms in config.json is not a number")])
def test_a_config_without_the_facts_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        resolve_target(str(folder))


def test_a_hub_id_without_a_hub_is_refused_in_one_line(tmp_path: Path) -> None:
    code = ("from distill_pipe.errors import UsageError\nfrom distill_pipe.produce.targets import resolve_target\n"
            "try: resolve_target('nobody/no-such-model')\nexcept UsageError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.stdout.startswith("target nobody/no-such-model cannot be had from the model hub: ")
    assert done.stdout.count("\n") == 1
