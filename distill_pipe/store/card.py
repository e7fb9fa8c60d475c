"""README.md of a dataset: the card that lets `datasets.load_dataset(root)` and people find their way.

Without its `configs:` a generic reader would merge shards, sidecars and plan into one table and fail.
"""

from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root
from distill_pipe.store.spec import CaptureSpec

_CARD = """---
configs:
- config_name: default
  default: true
  data_files: [{{split: train, path: "data/train/**/*.parquet"}}]
- config_name: hidden_states
  data_files: [{{split: train, path: "hidden_states/train/**/*.parquet"}}]
tags: [distill-pipe, speculative-decoding, knowledge-distillation]
---

# Target distribution of {target}

One row per prompt with its response. For every supervised token: the {head} with their log-probabilities, the
probability mass outside them, {tail_samples} samples of that mass, and the logsumexp of the raw logits. Hidden states
of layers {layers} lie in `hidden_states/`, codec `{codec}`. The format is described in `schemas/FORMAT.md` of
distill-pipe; everything but the hidden states is plain Parquet lists.

| | |
|---|---|
| target | {target} ({architecture}, {dtype}), revision `{revision}` |
| prompts | {prompts} |
| responses | {responses} |
| engine | {engine} {engine_version} |
| fingerprint | `{fingerprint}` |
"""


CARD = "README.md"


def write_card(root: Root, run: Run) -> None:
    """Write the card unless there is one already."""
    if root.size(CARD) is None:
        root.create_bytes(card_text(run).encode(), CARD)


def card_text(run: Run) -> str:
    """What a run says about itself before it has a shard."""
    spec = run.spec
    return _CARD.format(
        target=spec.target.name, architecture=spec.target.architecture, dtype=spec.target.dtype,
        revision=spec.target.revision, head=_head(spec.capture), tail_samples=spec.capture.tail_samples,
        layers=", ".join(map(str, spec.capture.layers)) or "(none)", codec=spec.capture.hidden_codec,
        prompts=spec.corpus.prompts, engine=spec.engine.name, engine_version=spec.engine.version,
        responses="written by the target" if spec.responses == "target" else "taken from the corpus",
        fingerprint=run.fingerprint)


def _head(capture: CaptureSpec) -> str:
    if capture.coverage is None:
        return f"{capture.top_k} most likely next tokens"
    return f"most likely next tokens that hold {capture.coverage:.4g} of the probability, at most {capture.top_k},"
