"""Fit a draft to a dataset: reader -> draft -> loss -> step, with the held-out acceptance rate before and after.

One process, one device, plain batches: a step holds float32 logits `[rows of the batch, V]` and their gradient, so
`batch_tokens` bounds the memory (512 tokens: at most 100 MB each at V = 49,152). Evaluation goes through the logits in
chunks. This is a reference, and a check that a dataset teaches; it does not replace a trainer.

Shapes: R rows, H hidden size, V vocabulary.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from distill_pipe.consume.drafts.eagle3 import Eagle3Draft, drafted_rows, read_config
from distill_pipe.consume.losses import LossOutput, TailRule, kl_loss, lk_alpha_loss, lk_hybrid_loss, tv_loss
from distill_pipe.consume.reader import Batch, ShardReader, Split
from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import Run, require_run
from distill_pipe.store.root import LocalRoot

EVALUATION_ROWS = 512


class LossFunction(Protocol):
    """The four losses, seen from the loop."""

    def __call__(self, draft_logits_RV: Tensor, target: SparseTarget, *, tail: TailRule) -> LossOutput: ...


class Draft(Protocol):
    """What evaluation needs of a draft: states by token index, and logits of some of them."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, batch: Batch) -> Tensor: ...

    def logits(self, states_RH: Tensor) -> Tensor: ...


LOSSES: dict[str, LossFunction] = {"kl": kl_loss, "tv": tv_loss, "lk-alpha": lk_alpha_loss, "lk-hybrid": lk_hybrid_loss}


class TrainSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a draft is trained: AdamW (0.9, 0.95), linear warm-up then cosine, clipped gradients.

    `warmup` is a share of the whole training. A draft must be evaluated with the `holdout_every` it was trained with.
    """

    arch: Literal["eagle3"] = "eagle3"
    loss: Literal["kl", "tv", "lk-alpha", "lk-hybrid"] = "lk-hybrid"
    tail: TailRule = "sampled"
    epochs: Annotated[int, Meta(ge=1)] = 3
    lr: Annotated[float, Meta(gt=0)] = 1e-3
    warmup: Annotated[float, Meta(ge=0, le=1)] = 0.1
    clip: Annotated[float, Meta(gt=0)] = 0.5
    batch_tokens: Annotated[int, Meta(ge=1)] = 512
    holdout_every: Annotated[int, Meta(ge=2)] = 10
    train_head: bool = False
    seed: int = 0


class Acceptance(Struct, frozen=True, kw_only=True):
    """Mean acceptance rate over `rows` held-out rows, and the bounds it lies between."""

    alpha: float
    lower: float
    upper: float
    rows: int


class Step(Struct, frozen=True, kw_only=True):
    """One optimiser step. `progress` is the share of the training that is done."""

    step: int
    progress: float
    rows: int
    loss: float
    alpha: float


class TrainResult(Struct, frozen=True, kw_only=True):
    """What training did. `loss_first` and `loss_last` are the means over the first and the last tenth of the steps."""

    before: Acceptance
    after: Acceptance
    layers: tuple[int, ...]
    steps: int
    rows: int
    seconds: float
    loss_first: float
    loss_last: float


def train(root: str | os.PathLike[str], target_folder: str | os.PathLike[str], settings: TrainSettings | None = None, *,
          out: str | os.PathLike[str] | None = None, device: str = "cpu",
          on_step: Callable[[Step], None] | None = None) -> TrainResult:
    """Train a draft on a dataset and measure what it gained on held-out traces.

    Args:
        root: the dataset; the stored hidden states are the draft's input.
        target_folder: the target's checkpoint, of which config.json, embedding, lm_head and final norm are read.
        settings: how to train; the defaults when not given.
        out: a folder for the trained weights (`model.safetensors`, without the frozen tables) and `draft.json`.
        on_step: called after each optimiser step.

    Raises:
        UsageError: the target is not the dataset's, no hidden state is stored, or there are too few traces.
        DamageError: a shard is missing or damaged.
    """
    settings = settings or TrainSettings()
    started = time.monotonic()
    run = require_run(LocalRoot(root))
    rule: TailRule = "sampled" if run.spec.capture.tail_samples else settings.tail
    draft = _new_draft(run, Path(target_folder), settings).to(device)
    heldout = _reader(root, draft, settings, "heldout")
    before = evaluate(draft, heldout, rule)
    steps = _fit(draft, _reader(root, draft, settings, "train"), settings, on_step)
    after = evaluate(draft, heldout, rule)
    if out is not None:
        save_draft(draft, Path(out))
    edge = max(1, len(steps) // 10)
    return TrainResult(before=before, after=after, layers=draft.layers, steps=len(steps),
                       rows=sum(s.rows for s in steps), seconds=time.monotonic() - started,
                       loss_first=sum(s.loss for s in steps[:edge]) / edge,
                       loss_last=sum(s.loss for s in steps[-edge:]) / edge)


@torch.no_grad()
def evaluate(draft: Draft, reader: ShardReader, tail: TailRule = "sampled") -> Acceptance:
    """The acceptance rate of a draft's first token over everything that `reader` yields.

    Raises:
        UsageError: there is nothing to evaluate on.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    rows = 0
    for batch in reader:
        batch = batch.to(draft.device)
        index_R, row_R = drafted_rows(batch)
        states_RH, target = draft(batch)[index_R], batch.target[row_R]
        for start in range(0, len(target), EVALUATION_ROWS):
            chunk = slice(start, start + EVALUATION_ROWS)
            output = tv_loss(draft.logits(states_RH[chunk]), target[chunk], tail=tail)
            totals += torch.stack([output.alpha_R.sum(), output.alpha_lower_R.sum(), output.alpha_upper_R.sum()]).cpu()
        rows += len(target)
    if rows == 0:
        raise UsageError("no row to evaluate a draft on: too few traces are held out (see holdout_every)")
    alpha, lower, upper = (totals / rows).tolist()
    return Acceptance(alpha=alpha, lower=lower, upper=upper, rows=rows)


def auxiliary_layers(run: Run) -> tuple[int, ...]:
    """The stored layers a draft reads: all but the last of the target, unless that is the only one.

    Raises:
        UsageError: no layer is stored.
    """
    stored = run.spec.capture.layers
    if not stored:
        raise UsageError("this dataset stores no hidden states; a draft cannot be trained on it")
    return tuple(n for n in stored if n != run.spec.target.num_layers) or stored


def learning_rate_share(progress: float, warmup: float) -> float:
    """The learning rate as a share of its peak: linear to 1 at `warmup`, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) if warmup < 1 else 1.0


def save_draft(draft: Eagle3Draft, folder: Path) -> None:
    """Write what was trained; the target's frozen tables are left out."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().cpu().contiguous() for name, p in draft.named_parameters() if p.requires_grad}
    save_file(trained, folder / "model.safetensors")
    (folder / "draft.json").write_bytes(msgspec.json.encode({"arch": "eagle3", "layers": draft.layers,
                                                             "config": draft.config}))


def _reader(root: str | os.PathLike[str], draft: Eagle3Draft, settings: TrainSettings, split: Split) -> ShardReader:
    return ShardReader(root, layers=draft.layers, batch_tokens=settings.batch_tokens, seed=settings.seed, split=split,
                       holdout_every=settings.holdout_every)


def _new_draft(run: Run, folder: Path, settings: TrainSettings) -> Eagle3Draft:
    config, target = read_config(folder), run.spec.target
    if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        raise UsageError(f"{folder} has hidden size {config.hidden_size} and vocabulary {config.vocab_size}; the "
                         f"dataset's target has {target.hidden_size} and {target.vocab_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        draft = Eagle3Draft(config, auxiliary_layers(run), train_head=settings.train_head)
    draft.start_from_target(folder)
    return draft


def _fit(draft: Eagle3Draft, reader: ShardReader, settings: TrainSettings,
         on_step: Callable[[Step], None] | None) -> list[Step]:
    trainable = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    total = settings.epochs * reader.num_traces()
    steps: list[Step] = []
    seen = 0
    for epoch in range(settings.epochs):
        for batch in reader.at_epoch(epoch):
            seen += len(batch.ordinals_B)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * learning_rate_share(seen / total, settings.warmup)
            output = _loss(draft, batch.to(draft.device), settings)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(output.loss)
            torch.nn.utils.clip_grad_norm_(trainable, settings.clip)
            optimizer.step()
            steps.append(Step(step=len(steps) + 1, progress=seen / total, rows=len(output.alpha_R),
                              loss=output.loss.item(), alpha=output.alpha.item()))
            if on_step is not None:
                on_step(steps[-1])
    return steps


def _loss(draft: Eagle3Draft, batch: Batch, settings: TrainSettings) -> LossOutput:
    index_R, row_R = drafted_rows(batch)
    return LOSSES[settings.loss](draft.logits(draft(batch)[index_R]), batch.target[row_R], tail=settings.tail)
