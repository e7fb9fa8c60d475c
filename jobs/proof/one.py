"""One training of the experiment and everything that is measured of it, in one JSON file.

A training that was interrupted goes on from its last checkpoint. Every draft is evaluated on the same held-out rows,
with lossless states and the unbiased tail rule, whatever it was trained from: what counts is how it drafts for the real
target. Weights are kept for one seed, so that an engine can be tried with them; the others are dropped.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from distill_pipe.consume.drafts.checkpoint import load_draft
from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.consume.evaluate import Evaluation, evaluate_draft
from distill_pipe.consume.train import TrainResult, train
from distill_pipe.produce.replay import load_model
from distill_pipe.produce.targets import resolve_target
from distill_pipe.speculative.bench import BenchSettings, DraftBench, bench_prompts, count_accepted, stop_tokens
from distill_pipe.speculative.prompts import DOMAINS
from distill_pipe.speculative.target import CachedTarget
from jobs.proof.data import TARGET
from jobs.proof.plan import MAIN, Scale, Training

CHECKPOINT_EVERY = 50
KEPT_SEED = 0
Decode = Callable[[Draft, Scale], DraftBench]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`evaluation`: on the held-out rows of the main dataset. `predicted`: from the rows of texts at T = 1 and T = 0
    over held-out prompts; `decoded`: what decoding with some of these prompts counted."""

    training: Training
    scale: Scale
    trained: TrainResult
    evaluation: Evaluation
    predicted: tuple[Evaluation, ...] = ()
    decoded: DraftBench | None = None


def run_training(training: Training, folder: Path, results: Path, scale: Scale, target_folder: Path,
                 decode: Decode) -> Result:
    """Train, measure, and write the result; what is there already is returned."""
    path = results / f"{training.name}.json"
    if path.exists():
        return read_result(path)
    weights = folder / "drafts" / training.name
    settings = training.settings(scale)
    trained = _trained(training, folder, weights, scale, target_folder)
    draft = load_draft(weights, target_folder)
    result = Result(training=training, scale=scale, trained=trained,
                    evaluation=evaluate_draft(folder / MAIN, draft, settings.holdout_every))
    if training.decode:
        predicted = tuple(evaluate_draft(folder / f"decoded-t{t}", draft, settings.holdout_every,
                                         temperatures=[float(t)], split="all") for t in (0, 1))
        result = msgspec.structs.replace(result, predicted=predicted, decoded=decode(draft, scale))
    results.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    scratch.replace(path)
    if training.seed != KEPT_SEED:
        shutil.rmtree(weights)
    return result


def _trained(training: Training, folder: Path, weights: Path, scale: Scale, target_folder: Path) -> TrainResult:
    """Train, unless that was done and only the measuring was interrupted."""
    done = weights / "trained.json"
    if done.exists():
        return msgspec.json.decode(done.read_bytes(), type=TrainResult)
    trained = train(folder / training.dataset, target_folder, training.settings(scale), out=weights,
                    checkpoint_every=CHECKPOINT_EVERY)
    done.write_bytes(msgspec.json.encode(trained))
    return trained


def decode_with_target(draft: Draft, scale: Scale) -> DraftBench:
    """Count what the real target accepts, by domain, at T = 0 and T = 1."""
    target = resolve_target(TARGET)
    prompts = list(bench_prompts(target, list(DOMAINS), scale.bench_prompts, scale.bench_tokens))
    model = CachedTarget(load_model(target, "float32"), draft.layers)
    settings = BenchSettings(prompts=scale.bench_prompts, max_tokens=scale.bench_tokens)
    return count_accepted(model, draft, prompts, settings, TARGET, stop_tokens(target))


def read_result(path: Path) -> Result:
    """A result from its file."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def run_named(training: Training, folder: Path, results: Path, scale: Scale) -> None:
    """One training in this process, on one thread."""
    torch.set_num_threads(1)
    run_training(training, folder, results, scale, resolve_target(TARGET).folder, decode_with_target)
