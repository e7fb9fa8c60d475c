"""Catches a setting that loses against a weaker source, is misread, or is wrong without the user being told which."""

from pathlib import Path

import pytest

from distill_pipe.errors import UsageError
from distill_pipe.produce.job import CaptureOptions, Job, load_job
from distill_pipe.store.spec import SamplingSpec

NEEDED = {"target": "t", "corpus": ["c.jsonl"], "out": "o"}


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_options_alone_make_a_job_with_the_stated_defaults() -> None:
    assert load_job(None, [], NEEDED) == Job(target="t", corpus=("c.jsonl",), out="o")
    job = load_job(None, [], NEEDED)
    assert (job.responses, job.prompts_per_shard, job.workers) == ("target", 64, 1)
    assert job.sampling == SamplingSpec(temperature=1.0, top_p=1.0, max_tokens=1024, seed=0)
    assert job.capture == CaptureOptions(tail_samples=8, layers=None, hidden_codec="bf16-split", logprob_bits=7)


def test_a_setting_goes_over_the_file_and_an_option_over_both(tmp_path: Path) -> None:
    file = job_file(tmp_path, "capture: {top_k: 1, tail_samples: 1, layers: [1]}\nworkers: 1\nsampling: {seed: 5}\n")
    job = load_job(file, ["capture.top_k=2", "capture.tail_samples=2"], NEEDED | {"capture.top_k": 3, "workers": None})
    assert (job.capture.top_k, job.capture.tail_samples, job.capture.layers) == (3, 2, (1,))
    assert (job.workers, job.sampling.seed) == (1, 5)


def test_a_later_setting_goes_over_an_earlier_one() -> None:
    assert load_job(None, ["limit=1", "limit=2"], NEEDED).limit == 2


def test_a_file_alone_is_enough(tmp_path: Path) -> None:
    file = job_file(tmp_path, "target: t\ncorpus: c.jsonl\nout: o\nresponses: corpus\ncapture:\n  layers: []\n")
    job = load_job(file, [], {"target": None, "corpus": None})
    assert (job.target, job.corpus_files, job.out, job.responses) == ("t", ("c.jsonl",), "o", "corpus")
    assert job.capture.layers == ()


def test_values_of_settings_are_read_as_yaml() -> None:
    settings = ["capture.layers=[2, 5]", "sampling.temperature=0.5", "address=ray://h:1", "revision='123'",
                "limit=null"]
    job = load_job(None, settings, NEEDED)
    assert (job.capture.layers, job.sampling.temperature, job.limit) == ((2, 5), 0.5, None)
    assert (job.address, job.revision) == ("ray://h:1", "123")


def test_a_value_may_hold_an_equals_sign() -> None:
    assert load_job(None, ["out=a=b"], NEEDED | {"out": None}).out == "a=b"


@pytest.mark.parametrize("missing", ["target", "corpus", "out"])
@pytest.mark.parametrize("value", [None, ()])
def test_what_is_missing_is_named(missing: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"missing: --{missing} \("):
        load_job(None, [], NEEDED | {missing: value})


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(UsageError, match="missing: --target, --corpus, --out"):
        load_job(None, [], {})


@pytest.mark.parametrize(("setting", "path"), [
    ("captur.top_k=3", "unknown field `captur`"), ("capture.topk=3", r"unknown field `topk` - at `\$.capture`"),
    ("capture.top_k=many", r"\$\.capture\.top_k"), ("capture.top_k=0", r"\$\.capture\.top_k"),
    ("capture.layers=3", r"\$\.capture\.layers"), ("capture.layers=[1, -1]", r"\$\.capture\.layers\[1\]"),
    ("capture.hidden_codec=int8", r"\$\.capture\.hidden_codec"),
    ("capture.logprob_bits=25", r"\$\.capture.logprob_bits"),
    ("sampling.top_p=0", r"\$\.sampling\.top_p"), ("sampling.temperature=-1", r"\$\.sampling\.temperature"),
    ("sampling.seed=1.5", r"\$\.sampling\.seed"), ("responses=both", r"\$\.responses"), ("workers=0", r"\$\.workers"),
    ("limit=true", r"\$\.limit"), ("max_model_len=1", r"\$\.max_model_len"), ("out=2026-01-01", r"\$\.out"),
    ("corpus=5", r"\$\.corpus"), ("corpus=[5]", r"\$\.corpus\[0\]"), ("target=[a]", r"\$\.target"),
])
def test_an_unknown_field_or_a_wrong_value_is_refused_with_its_path(setting: str, path: str) -> None:
    name = setting.split("=")[0]
    with pytest.raises(UsageError, match=f"the job is not valid: .*{path}"):
        load_job(None, [setting], NEEDED | {name: None})


@pytest.mark.parametrize("setting", ["limit", "=3", ""])
def test_a_setting_without_name_or_value_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=f"--set {setting}: write it as name=value"):
        load_job(None, [setting], NEEDED)


@pytest.mark.parametrize("setting", ["limit=[", "limit={a", "out=2026-13-45", "limit=\x00", "limit=!!python/tuple [1]"])
def test_a_setting_that_is_not_yaml_is_refused_and_named(setting: str) -> None:
    with pytest.raises(UsageError, match=r"--set (limit|out)=.* is not YAML"):
        load_job(None, [setting], NEEDED)


def test_a_setting_below_a_plain_value_is_refused() -> None:
    with pytest.raises(UsageError, match=r"limit\.x: limit is not a group of settings"):
        load_job(None, ["limit=3", "limit.x=4"], NEEDED)


@pytest.mark.parametrize(("text", "message"), [
    ("target: [", "is not YAML"), ("a: b: c", "is not YAML"), ("- a\n- b\n", "is not a mapping of names to values"),
    ("", "is not a mapping"), ("just text", "is not a mapping"), ("out: 2026-13-45", "is not YAML"),
    ("target: t\n\tx: 1", "is not YAML"), ("[" * 5000, "is not YAML")])
def test_a_file_that_is_no_job_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"job file .*job\.yaml {message}"):
        load_job(job_file(tmp_path, text), [], NEEDED)


def test_fields_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the job is not valid"):
        load_job(job_file(tmp_path, "1: 2\n"), [], NEEDED)


@pytest.mark.parametrize("make", [Path.exists, Path.mkdir, lambda path: path.write_bytes(b"\xff")])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, make) -> None:
    make(tmp_path / "job.yaml")
    with pytest.raises(UsageError, match=r"job\.yaml cannot be read"):
        load_job(tmp_path / "job.yaml", [], NEEDED)


@pytest.mark.parametrize(("settings", "top_k", "coverage"), [
    ([], 32, None), (["capture.top_k=64"], 64, None), (["capture.coverage=0.999"], 256, 0.999),
    (["capture.coverage=0.9", "capture.top_k_max=40"], 40, 0.9)])
def test_the_head_is_fixed_or_adaptive(settings: list[str], top_k: int, coverage: float | None) -> None:
    spec = load_job(None, settings, NEEDED).capture.spec((2,))
    assert (spec.top_k, spec.coverage, spec.layers) == (top_k, coverage, (2,))


@pytest.mark.parametrize(("settings", "message"), [
    (["capture.coverage=0.9", "capture.top_k=8"], "give one of them"),
    (["capture.top_k_max=8"], "goes with coverage")])
def test_a_head_that_is_fixed_and_adaptive_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_job(None, settings, NEEDED).capture.spec(())
