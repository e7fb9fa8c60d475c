"""One run as its user describes it: the target's preset, a YAML file, `--set a.b=c`, and the options of `generate`, in
rising order.

What is identity ends in the dataset's `RunSpec`; the rest (workers, address, paths) may differ at every start.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta, Struct

from distill_pipe.errors import UsageError
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.layouts import fill_in
from distill_pipe.store.spec import CaptureSpec, HiddenCodec, Responses, SamplingSpec

Plain = dict[str, object]


class CaptureOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to store per supervised position. `layers` are numbers, or a word as for `--layers` (`3+last`, `last`,
    `none`); null takes the target's default.

    Rows have `top_k` head entries each (32 when it is not given), or with `coverage` as many as hold that share of the
    probability, at most `top_k_max`.
    """

    top_k: Annotated[int, Meta(ge=1)] | None = None
    coverage: Annotated[float, Meta(gt=0, lt=1)] | None = None
    top_k_max: Annotated[int, Meta(ge=1)] | None = None
    tail_samples: Annotated[int, Meta(ge=0)] = 8
    layers: tuple[Annotated[int, Meta(ge=0)], ...] | str | None = None
    hidden_codec: HiddenCodec = "bf16-split"
    logprob_bits: Annotated[int, Meta(ge=3, le=24)] = 7

    def spec(self, layers: tuple[int, ...]) -> CaptureSpec:
        """What a dataset records of these options, for the layers that a target resolved them to.

        Raises:
            UsageError: fixed and adaptive head are asked for at once.
        """
        if self.coverage is None and self.top_k_max is not None:
            raise UsageError("top_k_max goes with coverage; for the same number of head entries in every row use top_k")
        if self.coverage is not None and self.top_k is not None:
            raise UsageError("top_k fixes the head entries of every row and coverage lets them vary; give one of them")
        top_k = self.top_k or 32 if self.coverage is None else self.top_k_max or 256
        return CaptureSpec(top_k=top_k, coverage=self.coverage, tail_samples=self.tail_samples, layers=layers,
                           hidden_codec=self.hidden_codec, logprob_bits=self.logprob_bits)


class Job(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job file. Paths are relative to where the command runs; what the command line gives may be left out. `gpus`
    (`8xH200`) picks the engine's layout and the number of workers by the target's preset.

    When more than `max_failed_share` of the prompts, and more than one, fail in the engine or in capture, a run stops,
    since something general is wrong. An engine that does not start within `start_seconds`, or runs no token for
    `stall_seconds`, is replaced.
    """

    target: str
    corpus: str | tuple[str, ...]
    out: str
    responses: Responses = "target"
    limit: Annotated[int, Meta(ge=1)] | None = None
    revision: str | None = None
    dtype: str | None = None
    max_model_len: Annotated[int, Meta(ge=2)] | None = None
    sampling: SamplingSpec = SamplingSpec()
    capture: CaptureOptions = CaptureOptions()
    engine: EngineOptions = EngineOptions()
    prompts_per_shard: Annotated[int, Meta(ge=1)] = 64
    workers: Annotated[int, Meta(ge=1)] = 1
    address: str | None = None
    gpus: str | None = None
    max_failed_share: Annotated[float, Meta(ge=0, le=1)] = 0.001
    start_seconds: Annotated[float, Meta(gt=0)] = 3600.0
    stall_seconds: Annotated[float, Meta(gt=0)] = 1800.0

    @property
    def corpus_files(self) -> tuple[str, ...]:
        """The corpus, one address or several, in the order given."""
        return (self.corpus,) if isinstance(self.corpus, str) else self.corpus


def load_job(file: Path | None, settings: Sequence[str], options: Mapping[str, object], *,
             needs_out: bool = True) -> Job:
    """The job from a file, then `a.b=c` settings, then options (dotted names; None means not given). A plan may leave
    `out` empty.

    Raises:
        UsageError: the file cannot be read, or a value or field is not what a job has.
    """
    plain: Plain = {} if file is None else _read(file)
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise UsageError(f"--set {setting}: write it as name=value, for example --set capture.top_k=64")
        _put(plain, name.strip(), _yaml(text, f"--set {setting}"))
    for name, value in options.items():
        if value is not None:
            _put(plain, name, value)
    if not needs_out:
        plain.setdefault("out", "")
    missing = [f"--{name}" for name in ("target", "corpus", "out") if plain.get(name) in (None, (), [])]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)} (or the same fields in a job file)")
    fill_in(plain)
    try:
        return msgspec.convert(plain, Job)
    except msgspec.ValidationError as error:
        raise UsageError(f"the job is not valid: {error}") from None


def _read(file: Path) -> Plain:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"job file {file} cannot be read: {error}") from None
    plain = _yaml(text, f"job file {file}")
    if not isinstance(plain, dict):
        raise UsageError(f"job file {file} is not a mapping of names to values")
    return plain


def _yaml(text: str, where: str) -> object:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _put(plain: Plain, name: str, value: object) -> None:
    *groups, leaf = name.split(".")
    for group in groups:
        inner = plain.setdefault(group, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{name}: {group} is not a group of settings")
        plain = inner
    plain[leaf] = value
