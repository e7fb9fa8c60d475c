"""Datasets in the files that other trainers read, one module per trainer; `distill_pipe.consume.export` writes them and
`distill_pipe.consume.adapters` yields the same dictionaries without any file.

Of each trainer the loader was read, in the version that its module names; names, shapes, dtypes, shifts and norms are
the loader's. Its opinions are kept too: where it renormalises, the module says what is lost.
"""

import os

from distill_pipe.consume.exporters.angelslim import AngelSlim
from distill_pipe.consume.exporters.automodel_dspark import AutomodelDspark
from distill_pipe.consume.exporters.automodel_eagle3 import AutomodelEagle3
from distill_pipe.consume.exporters.axolotl import Axolotl
from distill_pipe.consume.exporters.deepspec import DeepSpec
from distill_pipe.consume.exporters.distillkit import DistillKit
from distill_pipe.consume.exporters.layout import DEFAULTS, ExportOptions, Layout
from distill_pipe.consume.exporters.modelopt import ModelOpt
from distill_pipe.consume.exporters.specforge import SpecForge
from distill_pipe.consume.exporters.speculators import Speculators
from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import open_root

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (
    Speculators, SpecForge, ModelOpt, AutomodelEagle3, AutomodelDspark, DeepSpec, AngelSlim, Axolotl, DistillKit)}

__all__ = ["DEFAULTS", "LAYOUTS", "ExportOptions", "Layout", "trainer_layout"]


def trainer_layout(root: str | os.PathLike[str], trainer: str, options: ExportOptions = DEFAULTS) -> Layout:
    """A trainer's layout of the dataset at `root`.

    Raises:
        UsageError: the trainer is unknown, or the dataset lacks what it needs; says what to add.
        MismatchError: `root` is not a dataset that this version reads.
    """
    if trainer not in LAYOUTS:
        raise UsageError(f"unknown trainer {trainer!r}: give one of {', '.join(LAYOUTS)}")
    return LAYOUTS[trainer](root, require_run(open_root(root)), options)
