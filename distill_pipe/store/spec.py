"""What a dataset *is*: every setting that changes its bytes, and the fingerprint over them.

Identity and resources are kept apart. What is in `RunSpec` is hashed, frozen into run.json and compared on resume;
GPUs, workers, paths and addresses appear nowhere in it. The trade-off: a setting that only *might* change bytes (the
engine's version, its context length) counts as identity, so an upgrade in the middle of a run is refused rather than
mixed in silently.
"""

import hashlib
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

FORMAT_VERSION: Final = 1

Responses = Literal["target", "corpus"]
HiddenCodec = Literal["f32", "bf16", "bf16-split", "fp8", "q8", "q6", "q5"]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class TargetSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The target model. `revision` is a hub commit, or `sha256:<digest>` over a local folder's weights."""

    name: str
    revision: str
    architecture: str
    dtype: str
    vocab_size: Annotated[int, Meta(ge=1)]
    hidden_size: Annotated[int, Meta(ge=1)]
    num_layers: Annotated[int, Meta(ge=1)]
    final_norm_eps: float | None = None
    tokenizer_sha256: Sha256
    chat_template_sha256: Sha256 | None = None


class CorpusFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One corpus file, by content: its path is not part of the identity."""

    name: str
    sha256: Sha256


class CorpusSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The corpus files in the order given, and how many prompts were taken from them."""

    files: tuple[CorpusFile, ...]
    prompts: Annotated[int, Meta(ge=1)]


class SamplingSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the target writes its responses. `max_tokens` counts response tokens."""

    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Meta(ge=1)] = 1024
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class CaptureSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of the target at each supervised position.

    `top_k` is the number of head entries of every row; with `coverage` it is the most that a row may have, and the row
    takes as few as hold that share of the probability. `layers` are canonical: n is the residual stream after n decoder
    layers, 0 the embeddings, N the state before the final norm. `logprob_bits` is how many significant bits of a
    log-probability are stored; 24 keeps float32 as it is.
    """

    top_k: Annotated[int, Meta(ge=1)] = 32
    coverage: Annotated[float, Meta(gt=0, lt=1)] | None = None
    tail_samples: Annotated[int, Meta(ge=0)] = 8
    layers: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    hidden_codec: HiddenCodec = "bf16-split"
    logprob_bits: Annotated[int, Meta(ge=3, le=24)] = 7


class EngineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine that ran the target; its numerics differ by version."""

    name: str
    version: str
    max_model_len: Annotated[int, Meta(ge=2)]


class RunSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides the bytes of a dataset."""

    format_version: Literal[1] = FORMAT_VERSION
    target: TargetSpec
    corpus: CorpusSpec
    responses: Responses
    sampling: SamplingSpec | None
    capture: CaptureSpec
    engine: EngineSpec
    prompts_per_shard: Annotated[int, Meta(ge=1)]

    @property
    def num_shards(self) -> int:
        """How many shards the prompts make; the last one may be short."""
        return -(-self.corpus.prompts // self.prompts_per_shard)

    @property
    def fingerprint(self) -> str:
        """sha256 over the canonical JSON (sorted keys, no spaces) of the whole spec."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def spec_differences(stored: RunSpec, given: RunSpec) -> list[str]:
    """One line per differing field, `path: stored X, given Y`."""
    old, new = _flatten(stored), _flatten(given)
    return [f"{path}: stored {old.get(path)!r}, given {new.get(path)!r}" for path in sorted(old | new)
            if old.get(path) != new.get(path)]


def _flatten(value: object, path: str = "") -> dict[str, object]:
    plain = msgspec.to_builtins(value)
    if isinstance(plain, dict):
        pairs = [(str(k), v) for k, v in plain.items()]
    elif isinstance(plain, (list, tuple)) and any(isinstance(item, dict) for item in plain):
        pairs = [(str(i), v) for i, v in enumerate(plain)]
    else:
        return {path: plain}
    flat: dict[str, object] = {}
    for key, item in pairs:
        flat |= _flatten(item, f"{path}.{key}" if path else key)
    return flat
