"""Commands that train a draft and say what it is worth: parse, call, print.

Facts go to stdout, progress to stderr: a bar on a terminal, a line for every tenth of the training elsewhere. Under
`torchrun` only the first process prints.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distill_pipe.draft_tables import print_bench, print_evaluation, print_training
from distill_pipe.errors import UsageError
from distill_pipe.options import Arch, Json, Losses, Precisions, Root, TailRules, TargetFolder
from distill_pipe.report_tables import say
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import open_root

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from distill_pipe.consume.train import Step

DraftFolder = Annotated[Path, typer.Option("--draft", help="The folder that `train --out` wrote.")]


def train(  # noqa: PLR0913 - one option per setting of a small reference trainer
    root: Root,
    arch: Annotated[Arch, typer.Option(help="The draft's architecture.")] = Arch.eagle3,
    loss: Annotated[Losses, typer.Option(help="The objective.")] = Losses.lk_hybrid,
    eta: Annotated[float | None, typer.Option(min=0, help="How fast lk-hybrid turns from KL to TV [3; medusa 10].")
                   ] = None,
    kl_share: Annotated[float | None, typer.Option(min=0, max=1, help="A fixed share of KL in lk-hybrid, in place of "
                                                                      "--eta.")] = None,
    tail: Annotated[TailRules, typer.Option(help="What stands in for the mass outside the head.")] = TailRules.sampled,
    positions: Annotated[int, typer.Option(min=1, help="Tokens to draft ahead.")] = 6,
    draft_vocab: Annotated[int | None, typer.Option(min=1, help="Draft only the N likeliest tokens [all].")] = None,
    target: TargetFolder = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, in place of --epochs.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training split.")] = 10,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 4e-4,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch, of each process.")] = 512,
    precision: Annotated[Precisions, typer.Option(help="The type of the draft's products.")] = Precisions.float32,
    seed: Annotated[int, typer.Option(help="Order of batches and initial weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to save the draft; a training saved there is continued.")
                   ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Save the training every N steps; 0 for never.")] = 0,
    log_dir: Annotated[Path | None, typer.Option(help="Write TensorBoard logs there.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small reference draft from the shards, and print its held-out acceptance rate before and after."""
    from distill_pipe.consume.train import TrainSettings
    from distill_pipe.consume.train import train as run_training

    objective = {"loss": loss.value, "tail": tail.value, "eta": eta, "kl_share": kl_share}
    try:
        settings = msgspec.convert({
            "arch": arch.value, "objective": objective, "positions": positions, "draft_vocab": draft_vocab,
            "steps": steps, "epochs": epochs, "lr": lr, "batch_tokens": batch_tokens, "precision": precision.value,
            "seed": seed}, TrainSettings)
    except msgspec.ValidationError as error:
        raise UsageError(f"these settings cannot be used: {error}") from error
    folder = _target_folder(root, target)
    with ExitStack() as stack:
        group = stack.enter_context(_ranks())
        watchers = [stack.enter_context(w) for w in _watchers(log_dir)]

        def on_step(step: "Step") -> None:
            for watcher in watchers:
                watcher.update(step)

        result = run_training(str(root), folder, settings, out=out, checkpoint_every=checkpoint_every, group=group,
                              on_step=on_step)
    if _is_first():
        print_training(result, as_json)


def evaluate(
    root: Root,
    draft: DraftFolder,
    temperature: Annotated[list[float] | None, typer.Option(help="Of the verification; may be repeated [0 and 1].")
                           ] = None,
    target: TargetFolder = None,
    as_json: Json = False,
) -> None:
    """Say what a draft is worth from the held-out traces alone: acceptance by position, and tokens per target step."""
    from distill_pipe.consume.evaluate import evaluate as run_evaluation

    print_evaluation(run_evaluation(str(root), draft, _target_folder(root, target),
                                    temperatures=temperature or (0.0, 1.0)), as_json)


def bench_draft(  # noqa: PLR0913 - one option per setting of `BenchSettings`, and what it is run on
    draft: DraftFolder,
    target: Annotated[str, typer.Option(help="The target to verify with.")] = "smollm2-135m",
    corpus: Annotated[list[str] | None, typer.Option(help="Prompts: general, code, maths, or a JSONL file; may be "
                                                          "repeated [all three].")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each domain.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write per prompt.")] = 64,
    temperature: Annotated[list[float] | None, typer.Option(min=0, help="May be repeated [0 and 1].")] = None,
    k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Tokens to draft per step; may be repeated "
                                                                   "[positions].")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    vllm: Annotated[bool, typer.Option("--vllm", help="Let vLLM decode the same prompts too, at T = 0.")] = False,
    as_json: Json = False,
) -> None:
    """Decode speculatively with a real target and a draft, lossless, and count what is accepted."""
    from distill_pipe.speculative.bench import BenchSettings
    from distill_pipe.speculative.bench import bench_draft as run_bench

    settings = BenchSettings(prompts=prompts, max_tokens=max_tokens, temperatures=tuple(temperature or (0.0, 1.0)),
                             drafted=tuple(k or ()), seed=seed, vllm=vllm)
    # What an engine prints is not the command's output.
    with redirect_stdout(sys.stderr):
        result = run_bench(target, draft, corpus or ["general", "code", "maths"], settings, say)
    print_bench(result, as_json)


def _target_folder(root: str | Path, target: str | None) -> Path:
    """Where the target's tables are: a folder that was given needs nothing else of a target."""
    from distill_pipe.produce.targets import resolve_target

    if target is not None and Path(target).is_dir():
        return Path(target)
    return resolve_target(target or require_run(open_root(root)).spec.target.name).folder


@contextmanager
def _ranks() -> Iterator["ProcessGroup | None"]:
    """The processes that `torchrun` has started, as one group; None for a single one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from distill_pipe.consume.ranks import join_torchrun, leave_group

    yield join_torchrun()
    # Only after a success: a rank that failed would wait for the others, which wait for it.
    leave_group()


class _Watcher(Protocol):
    def update(self, step: "Step") -> None: ...


def _watchers(log_dir: Path | None) -> list[AbstractContextManager[_Watcher]]:
    if not _is_first():
        return []
    console = Console(stderr=True)
    shown: AbstractContextManager[_Watcher] = Bar(console) if console.is_terminal else nullcontext(_Lines())
    return [shown] if log_dir is None else [shown, _TensorBoard(log_dir)]


def _is_first() -> bool:
    """False in all processes of a distributed training but one. `torchrun` says who is who."""
    return os.environ.get("RANK", "0") == "0"


class _Lines:
    """A line on stderr for every tenth of a training."""

    def __init__(self) -> None:
        self._printed = 0

    def update(self, step: "Step") -> None:
        if int(step.progress * 10) > self._printed:
            self._printed = int(step.progress * 10)
            say(f"{step.progress:4.0%}  step {step.step}  {_facts(step)}")


class Bar:
    """A bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(TextColumn("training"), BarColumn(), TextColumn("step {task.fields[step]}"),
                             TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                             console=console)

    def __enter__(self) -> "Bar":
        self._bar.start()
        self._bar.add_task("training", total=1.0, step=0, facts="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: "Step") -> None:
        self._bar.update(self._bar.tasks[0].id, completed=step.progress, step=step.step, facts=_facts(step))


class _TensorBoard:
    """Loss, learning rate and the acceptance rate of each position, by step.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--log-dir needs TensorBoard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> "_TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def update(self, step: "Step") -> None:
        values = {"loss": step.loss, "lr": step.lr}
        values |= {f"alpha/{position}": alpha for position, alpha in enumerate(step.alphas, 1)}
        for name, value in values.items():
            self._writer.add_scalar(name, value, step.step)


def _facts(step: "Step") -> str:
    return f"loss {step.loss:.4f}  alpha {step.alphas[0]:.3f} .. {step.alphas[-1]:.3f}"
