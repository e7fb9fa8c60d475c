"""Fit a draft to a dataset: reader -> draft -> loss -> step, with the held-out acceptance rate before and after.

The defaults are the recipe of arXiv 2602.23881 section 5 as far as it is stated: six positions with gamma 0.8, AdamW
(0.9, 0.95), 4e-4 with 100 steps of warm-up and a cosine, gradients clipped at 0.5. A step holds float32 logits
`[rows of the batch, D]` of every position, so `batch_tokens` and `draft_vocab` bound the memory. This is a reference,
and a check that a dataset teaches; it does not replace a trainer.

Under `torchrun` every process takes its own batches, and gradients are summed so that a step is the step of one process
on all of them. A training with an `out` folder can be saved on the way and continued bit for bit.

Shapes: R rows, V vocabulary, D draft vocabulary.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
import torch.distributed as dist
from msgspec import Meta, Struct
from torch import Tensor

from distill_pipe.consume.acceptance import Acceptance, heldout_acceptance
from distill_pipe.consume.comparison import TailRule
from distill_pipe.consume.drafts.checkpoint import DRAFTS, Arch, claim_folder, new_draft, save_draft
from distill_pipe.consume.drafts.draft import POSITIONS, Draft
from distill_pipe.consume.drafts.target_files import read_config, read_tables
from distill_pipe.consume.exact import final_norm
from distill_pipe.consume.objective import BatchLoss, Objective, RowsOf, batch_loss, exact_rows, stored_rows
from distill_pipe.consume.reader import Batch, ShardReader, Split
from distill_pipe.consume.training_state import Place, Saved, drop_training, restore_training, save_training
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import Run, require_run
from distill_pipe.store.root import open_root

# Of a training shorter than ten times the warm-up, a tenth warms up.
_WARMUP_SHARE = 0.1

LossOfBatch = Callable[[Batch], BatchLoss]
Precision = Literal["float32", "bfloat16"]


class TrainSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the trained weights. A draft must be evaluated with the `holdout_every` it was trained with.

    `steps` ends the training there, over as many epochs as that takes; without it there are `epochs` of them.
    `draft_vocab`: how many tokens the draft can draft, the likeliest of the training split; all by default.
    `precision`: the type that the draft's products are made in. Weights, optimiser and losses are float32.
    """

    arch: Arch = "eagle3"
    objective: Objective = Objective()
    positions: Annotated[int, Meta(ge=1)] = POSITIONS
    draft_vocab: Annotated[int, Meta(ge=1)] | None = None
    steps: Annotated[int, Meta(ge=1)] | None = None
    epochs: Annotated[int, Meta(ge=1)] = 10
    lr: Annotated[float, Meta(gt=0)] = 4e-4
    warmup_steps: Annotated[int, Meta(ge=1)] = 100
    clip: Annotated[float, Meta(gt=0)] = 0.5
    batch_tokens: Annotated[int, Meta(ge=1)] = 512
    holdout_every: Annotated[int, Meta(ge=2)] = 10
    precision: Precision = "float32"
    seed: int = 0


class Step(Struct, frozen=True, kw_only=True):
    """One optimiser step. `progress` is the share of the training that is done; `alphas` are by position."""

    step: int
    progress: float
    rows: int
    loss: float
    lr: float
    alphas: tuple[float, ...]


class TrainResult(Struct, frozen=True, kw_only=True):
    """What training did. `before` and `after` are by position; `rows` counts those of the first position. `loss_first`
    and `loss_last` are the means over the first and the last tenth of the steps."""

    before: tuple[Acceptance, ...]
    after: tuple[Acceptance, ...]
    layers: tuple[int, ...]
    draft_vocab: int
    parameters: int
    steps: int
    rows: int
    seconds: float
    loss_first: float
    loss_last: float


def train(root: str | os.PathLike[str], target_folder: str | os.PathLike[str],
          settings: TrainSettings | None = None, *, out: str | os.PathLike[str] | None = None,
          checkpoint_every: int = 0, device: str = "cpu", group: dist.ProcessGroup | None = None,
          on_step: Callable[[Step], None] | None = None) -> TrainResult:
    """Train a draft on a dataset and measure what it gained on held-out traces.

    Args:
        root: the dataset; the stored hidden states are the draft's input.
        target_folder: the target's checkpoint, of which config.json, embedding, lm_head and final norm are read.
        settings: how to train; the defaults when not given.
        out: a folder for the draft; see `drafts.checkpoint`. A training that was saved there is continued.
        checkpoint_every: save the training there every so many steps; 0 for never.
        group: the data-parallel ranks, all of which call this. The first of them writes.
        on_step: called after each optimiser step.

    Raises:
        UsageError: the target is not the dataset's, a state it needs is not stored, there are too few traces, or `out`
            cannot be written or holds another model.
        MismatchError: `out` holds a training with other settings.
        DamageError: a shard is missing or damaged.
    """
    settings = settings or TrainSettings()
    if checkpoint_every and out is None:
        raise UsageError("a training can be saved on the way only with a folder for the draft (--out)")
    folder = None if out is None else Path(out)
    writes = group is None or dist.get_rank(group) == 0
    if folder and writes:
        claim_folder(folder)
    run = require_run(open_root(root))
    draft = _new_draft(root, run, Path(target_folder), settings).to(device)
    training = _Training(draft, _reader(root, draft.layers, settings, "train", group),
                         _loss_of_batch(root, draft, settings, Path(target_folder), group), settings, group)
    heldout, identity = _reader(root, draft.layers, settings, "heldout", None), _identity(run, settings, group)
    saved = restore_training(folder, identity, training.weights, training.optimizer) if folder else None
    if saved is not None:
        training.restore(saved)
    rule: TailRule = "sampled" if run.spec.capture.tail_samples else "bucket"
    before = heldout_acceptance(draft, heldout, rule) if saved is None else saved.before

    def after_step(step: Step) -> None:
        if folder and writes and checkpoint_every and step.step % checkpoint_every == 0:
            save_training(folder, training.saved(identity, before), training.weights, training.optimizer)
        if on_step is not None:
            on_step(step)

    training.run(after_step)
    after = heldout_acceptance(draft, heldout, rule)
    if folder and writes:
        save_draft(draft, folder, target=run.spec.target.name, holdout_every=settings.holdout_every)
        drop_training(folder)
    return _result(draft, training, before, after)


def _result(draft: Draft, training: "_Training", before: tuple[Acceptance, ...],
            after: tuple[Acceptance, ...]) -> TrainResult:
    losses, edge = training.losses, max(1, len(training.losses) // 10)
    return TrainResult(before=before, after=after, layers=draft.layers, draft_vocab=draft.draft_vocab_size,
                       parameters=sum(w.numel() for w in training.weights.values()), steps=len(losses),
                       rows=training.place.rows, seconds=training.place.seconds,
                       loss_first=sum(losses[:edge]) / edge, loss_last=sum(losses[-edge:]) / edge)


class _Training:
    """The loop of one rank. A saved training may be restored before it runs."""

    def __init__(self, draft: Draft, reader: ShardReader, loss: LossOfBatch, settings: TrainSettings,
                 group: dist.ProcessGroup | None) -> None:
        self._draft, self._reader, self._loss, self._settings, self._group = draft, reader, loss, settings, group
        self.weights = {name: w for name, w in draft.named_parameters() if w.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.place, self.losses = Place(), list[float]()
        if not reader.num_traces():
            raise UsageError("no trace to train on: all are held out (see holdout_every)")

    def restore(self, saved: Saved) -> None:
        self.place, self.losses = saved.place, list(saved.losses)
        self._reader.load_state_dict(saved.reader)

    def saved(self, identity: str, before: tuple[Acceptance, ...]) -> Saved:
        return Saved(place=self.place, identity=identity, reader=self._reader.state_dict(), losses=tuple(self.losses),
                     before=before)

    def run(self, after_step: Callable[[Step], None]) -> None:
        """Train to the end, from wherever it stands."""
        while not self._done():
            self._epoch(after_step)

    def _done(self) -> bool:
        if self._settings.steps is not None:
            return self.place.step >= self._settings.steps
        return self.place.epoch >= self._settings.epochs

    def _epoch(self, after_step: Callable[[Step], None]) -> None:
        """What is left of the epoch; then it stands at the start of the next one."""
        batches = self._reader.at_epoch(self.place.epoch).num_steps()
        for batch in self._reader:
            started, place = time.monotonic(), self.place
            middle = self._progress(place, batches, 0.5)
            lr = self._settings.lr * learning_rate_share(place.step + 1, middle, self._settings.warmup_steps)
            found = self._step(batch.to(self._draft.device), lr)
            self.losses.append(found.loss.item())
            self.place = Place(step=place.step + 1, epoch=place.epoch, batches=place.batches + 1,
                               rows=place.rows + found.rows, seconds=place.seconds + time.monotonic() - started)
            after_step(Step(step=self.place.step, progress=self._progress(self.place, batches), rows=found.rows,
                            loss=self.losses[-1], lr=lr, alphas=found.alphas))
            if self._done():
                return
        self.place = msgspec.structs.replace(self.place, epoch=self.place.epoch + 1, batches=0)
        self._reader.set_epoch(self.place.epoch)

    def _progress(self, place: Place, batches: int, ahead: float = 0.0) -> float:
        """The share of the training that is done `ahead` steps after a place in an epoch of so many batches."""
        if self._settings.steps is not None:
            return (place.step + ahead) / self._settings.steps
        return (place.epoch + (place.batches + ahead) / batches) / self._settings.epochs

    def _step(self, batch: Batch, lr: float) -> BatchLoss:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        found = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(found.loss)
        if self._group is not None:
            average_gradients(list(self.weights.values()), self._group)
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self._settings.clip)
        self.optimizer.step()
        return found


def average_gradients(weights: list[Tensor], group: dist.ProcessGroup) -> None:
    """The mean over ranks, which is the gradient of all rows: see `ranks`."""
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    parts = torch.split(flat, [w.numel() for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)


def learning_rate_share(step: int, progress: float, warmup_steps: int) -> float:
    """The learning rate as a share of its peak: half a cosine from 1 to 0 over the whole training, below a line that
    rises to 1 over the warm-up. `progress` is that of the middle of the step, (i - 1/2) / n of step i of n: so the last
    one still trains, the only one too, and the mean over all steps is that of the cosine."""
    return min(1.0, max(step / warmup_steps, progress / _WARMUP_SHARE)) * 0.5 * (1 + math.cos(math.pi * progress))


def frequent_vocabulary(reader: ShardReader, size: int) -> DraftVocabulary:
    """The `size` tokens that the target expects most often over the traces of `reader`.

    Raises:
        UsageError: `size` is more than the target's vocabulary.
    """
    mass_V = torch.zeros(reader.run.spec.target.vocab_size, dtype=torch.float64)
    for batch in reader:
        held_RK = batch.target.topk_ids_RK >= 0
        mass_V.index_add_(0, batch.target.topk_ids_RK[held_RK], batch.target.topk_logprobs_RK[held_RK].double().exp())
    return DraftVocabulary.most_frequent(mass_V, size)


def _reader(root: str | os.PathLike[str], layers: tuple[int, ...], settings: TrainSettings, split: Split,
            group: dist.ProcessGroup | None) -> ShardReader:
    if settings.objective.tail == "exact" and split == "train" and layers:
        layers = (*layers, require_run(open_root(root)).spec.target.num_layers)
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    return ShardReader(root, layers=layers, batch_tokens=settings.batch_tokens, seed=settings.seed, split=split,
                       holdout_every=settings.holdout_every, dp_rank=rank, dp_world=world)


def _loss_of_batch(root: str | os.PathLike[str], draft: Draft, settings: TrainSettings, folder: Path,
                   group: dist.ProcessGroup | None) -> LossOfBatch:
    rows_of: RowsOf = stored_rows
    if settings.objective.tail == "exact":
        last = require_run(open_root(root)).spec.target.num_layers
        rows_of = exact_rows(final_norm(root).to(draft.device), read_tables(folder)[1].to(draft.device).float(), last)

    def loss_of_batch(batch: Batch) -> BatchLoss:
        with torch.autocast(draft.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            return batch_loss(draft, batch, settings.objective, rows_of, group)

    return loss_of_batch


def _new_draft(root: str | os.PathLike[str], run: Run, folder: Path, settings: TrainSettings) -> Draft:
    config, target = read_config(folder), run.spec.target
    if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        raise UsageError(f"{folder} has hidden size {config.hidden_size} and vocabulary {config.vocab_size}; the "
                         f"dataset's target has {target.hidden_size} and {target.vocab_size}")
    layers = DRAFTS[settings.arch].layers_read(run.spec.capture.layers, target.num_layers)
    vocabulary = None
    if settings.draft_vocab is not None and settings.draft_vocab < config.vocab_size:
        vocabulary = frequent_vocabulary(_reader(root, (), settings, "train", None), settings.draft_vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return new_draft(settings.arch, config, layers, settings.positions, vocabulary, folder)


def _identity(run: Run, settings: TrainSettings, group: dist.ProcessGroup | None) -> str:
    """What a saved training must agree on; another number of ranks makes other batches of a step."""
    world = 1 if group is None else dist.get_world_size(group)
    return hashlib.sha256(b"%s %d " % (run.fingerprint.encode(), world)
                          + msgspec.json.encode(settings, order="sorted")).hexdigest()
