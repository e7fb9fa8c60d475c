"""The command that turns a dataset into another trainer's files.

Like `cli`, which gives it its name, it parses, calls and prints.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distill_pipe.errors import UsageError
from distill_pipe.options import Json, Root, TargetFolder, layer_numbers
from distill_pipe.report_tables import print_facts, say


class Trainers(StrEnum):
    speculators = "speculators"
    specforge = "specforge"
    modelopt = "modelopt"
    automodel_eagle3 = "automodel-eagle3"
    automodel_dspark = "automodel-dspark"
    deepspec = "deepspec"
    angelslim = "angelslim"
    axolotl = "axolotl"
    distillkit = "distillkit"


class Splits(StrEnum):
    all = "all"
    train = "train"
    heldout = "heldout"


class StateDtypes(StrEnum):
    bf16 = "bf16"
    f32 = "f32"
    fp8 = "fp8"


def export(  # noqa: PLR0913 - one option per setting of the trainers' formats
    root: Root,
    to: Annotated[Trainers, typer.Option(help="The trainer.")],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted export is continued.")],
    layers: Annotated[str | None, typer.Option(help="Auxiliary layers, as in generate [all but the last].")] = None,
    dtype: Annotated[StateDtypes, typer.Option(help="Hidden states; fp8 for speculators alone.")] = StateDtypes.bf16,
    top_k: Annotated[int | None, typer.Option(help="Head entries per row, at most [all stored].")] = None,
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens per sample of automodel-*.")] = 2048,
    draft_vocab: Annotated[int | None, typer.Option(help="Tokens of the draft's vocabulary [the target's]."
                                                    )] = None,
    target: TargetFolder = None,
    split: Annotated[Splits, typer.Option(help="train leaves out every tenth trace, for distill-pipe evaluate."
                                          )] = Splits.all,
    as_json: Json = False,
) -> None:
    """Write a dataset as another trainer's loader reads it, with its layer numbers and its side of the final norm."""
    from distill_pipe.consume.export import export as run_export
    from distill_pipe.consume.exporters import ExportOptions

    options = ExportOptions(layers=_layers(layers), dtype=dtype.value, top_k=top_k, seq_length=seq_length,
                            draft_vocab=draft_vocab, target=_folder(target), split=split.value)
    try:
        report = run_export(root, to.value, out, options, _Progress())
    except KeyboardInterrupt:
        say("interrupted; the same command continues the export")
        raise typer.Exit(130) from None
    if report.dropped_mass is not None:
        say(f"{report.trainer} keeps the head alone: {report.dropped_mass:.1%} of the probability, the mean mass "
            "outside it, is dropped, and a loss on the rest has another optimum than the target")
    for note in report.notes:
        say(note)
    if report.cut_traces:
        say(f"{report.cut_traces} traces were cut to --seq-length {seq_length}")
    if as_json:
        print_facts(report, as_json)
        return
    ids = f"; auxiliary layers in its numbering: {', '.join(map(str, report.layer_ids))}" if report.layer_ids else ""
    say(f"{report.folder}: {report.samples} samples of {report.tokens} tokens for {report.trainer}, {report.bytes:,} "
        f"bytes; {report.files_written} files written, {report.files_kept} were there{ids}")


class _Progress:
    """A line on stderr for every tenth of an export."""

    def __init__(self) -> None:
        self._printed = 0

    def __call__(self, done: int, of: int) -> None:
        if done * 10 // of > self._printed:
            self._printed = done * 10 // of
            say(f"{done / of:4.0%}  {done} of {of} samples")


def _layers(text: str | None) -> tuple[int, ...] | None:
    layers = layer_numbers(text)
    if layers == []:
        raise UsageError("--layers none: an export for this trainer needs at least one")
    return None if layers is None else tuple(layers)


def _folder(target: str | None) -> Path | None:
    if target is None:
        return None
    from distill_pipe.produce.targets import resolve_target

    return resolve_target(target).folder
