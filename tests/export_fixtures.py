"""A dataset, a target's folder and an export for each trainer, for all test files of exports."""

from collections.abc import Callable
from pathlib import Path

import pytest
from export_datasets import SEQ, normed_dataset, target_weights

from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import ExportOptions
from distill_pipe.store.finalize import finalize
from distill_pipe.store.root import LocalRoot

Exported = Callable[[str], Path]


@pytest.fixture(scope="session")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    normed_dataset(folder)
    finalize(LocalRoot(folder))
    return folder


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "weights"
    target_weights(folder)
    return folder


@pytest.fixture(scope="session")
def options(target_folder: Path) -> ExportOptions:
    return ExportOptions(target=target_folder, seq_length=SEQ)


@pytest.fixture(scope="session")
def exported(normed: Path, options: ExportOptions, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export for a trainer, made once."""
    made: dict[str, Path] = {}

    def folder(trainer: str) -> Path:
        if trainer not in made:
            made[trainer] = tmp_path_factory.mktemp("export") / trainer
            export(normed, trainer, made[trainer], options)
        return made[trainer]

    return folder
