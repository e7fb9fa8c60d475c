"""Catches a setting that changes a dataset's bytes without changing its fingerprint, or a fingerprint that drifts."""

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from distill_pipe.errors import MismatchError
from distill_pipe.store.manifest import Run, require_same_run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.spec import (
    FORMAT_VERSION,
    CaptureSpec,
    CorpusFile,
    CorpusSpec,
    EngineSpec,
    RunSpec,
    SamplingSpec,
    TargetSpec,
    spec_differences,
)

EXAMPLE = RunSpec(
    target=TargetSpec(name="smollm2-135m", revision="sha256:" + "1" * 64, architecture="LlamaForCausalLM",
                      dtype="float32", vocab_size=49152, hidden_size=576, num_layers=30, final_norm_eps=1e-5,
                      tokenizer_sha256="2" * 64, chat_template_sha256="3" * 64),
    corpus=CorpusSpec(files=(CorpusFile(name="a.jsonl", sha256="4" * 64), CorpusFile(name="b.jsonl", sha256="5" * 64)),
                      prompts=100),
    responses="target", sampling=SamplingSpec(temperature=0.8, top_p=0.95, max_tokens=256, seed=7),
    capture=CaptureSpec(top_k=32, tail_samples=8, layers=(2, 15, 27, 30), hidden_codec="bf16-split",
                        coverage=0.999, logprob_bits=7),
    engine=EngineSpec(name="vllm", version="0.32.0", max_model_len=2048), prompts_per_shard=64)
# Old datasets can only be continued while this stays the same: a change here needs a new format version.
EXAMPLE_FINGERPRINT = "6501e963c0c40dea86e30ff07589b6f367f82dd5e69db110c0a7e8f82377f7ca"

Path = tuple[str | int, ...]
OTHER_CHOICE = {"target": "corpus", "bf16-split": "bf16"}


def leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Every plain value of a nested structure, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def changed(value: object) -> object:
    if isinstance(value, str):
        return OTHER_CHOICE.get(value) or value[:-1] + ("0" if value[-1] != "0" else "f")
    assert isinstance(value, int | float)
    return value + 1 if isinstance(value, int) else value / 2


def with_leaf(path: Path, value: object) -> RunSpec:
    plain: Any = msgspec.json.decode(msgspec.json.encode(EXAMPLE))
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return msgspec.convert(plain, RunSpec)


LEAVES = [(path, value) for path, value in leaves(msgspec.to_builtins(EXAMPLE)) if path != ("format_version",)]


def shuffled(value: object, chance: random.Random) -> object:
    if isinstance(value, dict):
        items = list(value.items())
        chance.shuffle(items)
        return {key: shuffled(item, chance) for key, item in items}
    return [shuffled(item, chance) for item in value] if isinstance(value, list) else value


def test_the_fingerprint_of_the_example_is_what_it_always_was() -> None:
    assert EXAMPLE.fingerprint == EXAMPLE_FINGERPRINT


def test_the_fingerprint_does_not_depend_on_the_order_of_fields() -> None:
    plain = msgspec.json.decode(msgspec.json.encode(EXAMPLE))
    for seed in range(20):
        text = msgspec.json.encode(shuffled(plain, random.Random(seed)))
        assert msgspec.json.decode(text, type=RunSpec).fingerprint == EXAMPLE.fingerprint


def test_the_fingerprint_survives_json() -> None:
    again = msgspec.json.decode(msgspec.json.encode(EXAMPLE), type=RunSpec)
    assert again == EXAMPLE
    assert again.fingerprint == EXAMPLE.fingerprint


@pytest.mark.parametrize(("path", "value"), LEAVES, ids=[".".join(map(str, path)) for path, _ in LEAVES])
def test_every_single_field_changes_the_fingerprint_and_is_the_one_difference_listed(path: Path, value: object) -> None:
    other = with_leaf(path, changed(value))
    assert other.fingerprint != EXAMPLE.fingerprint
    (line,) = spec_differences(EXAMPLE, other)
    # A list of plain values is one setting; a list of groups names the group.
    named = path[:-1] if path[:2] == ("capture", "layers") else path
    assert line.startswith(".".join(map(str, named)) + ": stored ")
    if named == path:
        assert line.endswith(f"stored {value!r}, given {changed(value)!r}")


def test_every_field_of_the_specification_was_changed_above() -> None:
    def fields(kind: type[msgspec.Struct]) -> set[str]:
        return set(kind.__struct_fields__)

    groups = {"target": TargetSpec, "sampling": SamplingSpec, "capture": CaptureSpec, "engine": EngineSpec}
    for name, kind in groups.items():
        assert {path[1] for path, _ in LEAVES if path[0] == name} == fields(kind)
    assert {path[0] for path, _ in LEAVES} | {"format_version"} == fields(RunSpec)
    assert {path[-1] for path, _ in LEAVES if path[:2] == ("corpus", "files")} == fields(CorpusFile)


@pytest.mark.parametrize(("change", "line"), [
    ({"sampling": None}, "sampling: stored None"), ({"responses": "corpus"}, "responses: stored"),
    ({"corpus": CorpusSpec(files=EXAMPLE.corpus.files[::-1], prompts=100)}, "corpus.files.0.name"),
    ({"corpus": CorpusSpec(files=(), prompts=100)}, "corpus.files"),
    ({"capture": CaptureSpec(layers=())}, "capture.layers: stored (2, 15, 27, 30), given ()")])
def test_values_that_appear_vanish_or_change_places_are_differences(change: dict[str, Any], line: str) -> None:
    other = msgspec.structs.replace(EXAMPLE, **change)
    assert other.fingerprint != EXAMPLE.fingerprint
    assert any(line.split(":")[0] in found for found in spec_differences(EXAMPLE, other))


def test_equal_specifications_have_no_differences() -> None:
    assert spec_differences(EXAMPLE, with_leaf(("capture", "top_k"), 32)) == []


def test_all_differences_are_listed_in_order_of_their_paths() -> None:
    other = msgspec.structs.replace(EXAMPLE, prompts_per_shard=1, responses="corpus",
                                    engine=EngineSpec(name="vllm", version="0.33.0", max_model_len=2048))
    assert spec_differences(EXAMPLE, other) == [
        "engine.version: stored '0.32.0', given '0.33.0'", "prompts_per_shard: stored 64, given 1",
        "responses: stored 'target', given 'corpus'"]


def test_continuing_under_other_settings_is_refused_with_every_difference(tmp_path: Any) -> None:
    run = Run(fingerprint=EXAMPLE.fingerprint, spec=EXAMPLE, plan=(), created_by="tests", created_at="2026-01-01")
    require_same_run(LocalRoot(tmp_path), run, EXAMPLE)
    other = msgspec.structs.replace(EXAMPLE, prompts_per_shard=1, responses="corpus")
    with pytest.raises(MismatchError, match=r"(?s)prompts_per_shard: stored 64, given 1.*responses: stored 'target'"):
        require_same_run(LocalRoot(tmp_path), run, other)


@pytest.mark.parametrize(("path", "value"), [
    (("target", "vocab_size"), 0), (("target", "tokenizer_sha256"), "short"), (("corpus", "prompts"), 0),
    (("responses",), "both"), (("capture", "top_k"), 0), (("capture", "tail_samples"), -1),
    (("capture", "hidden_codec"), "int8"), (("capture", "logprob_bits"), 25), (("capture", "layers"), [-1]),
    (("engine", "max_model_len"), 1), (("sampling", "top_p"), 0), (("prompts_per_shard",), 0),
    (("format_version",), FORMAT_VERSION + 1), (("workers",), 4), (("target", "path"), "/models")])
def test_values_out_of_range_and_unknown_fields_are_refused(path: Path, value: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$|unknown field"):
        with_leaf(path, value)
