"""Catches an export that is not continued where it stopped, that leaves half a file under a name that counts, or that
does not say what a dataset lacks.
"""

import json
import resource
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from export_datasets import (
    PROMPTS,
    SEQ,
    SHAPE,
    normed_dataset,
    pickled,
    traces,
)
from tiny_datasets import Shape, start_run

from distill_pipe.consume.export import RECORD, ExportReport, export
from distill_pipe.consume.exporters import LAYOUTS, ExportOptions
from distill_pipe.errors import DamageError, MismatchError, StorageFullError, UsageError
from distill_pipe.store.manifest import Run

pytest_plugins = ["export_fixtures"]
TRAINERS = list(LAYOUTS)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_interrupted_export_is_continued_and_ends_in_the_same_bytes(normed, options, exported, tmp_path, trainer
                                                                       ) -> None:
    whole, out = exported(trainer), tmp_path / "out"

    class Stop(Exception):  # noqa: N818 - not an error
        pass

    def stop(done: int, of: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        export(normed, trainer, out, options, stop)
    assert not (out / "manifest.json").exists()
    assert not (out / "state.json").exists()
    report = export(normed, trainer, out, options)
    files = LAYOUTS[trainer].samples_per_file
    assert (report.files_kept, report.files_written) == (1, -(-PROMPTS // files) - 1)
    assert contents(out) == contents(whole)
    assert export(normed, trainer, out, options).files_written == 0


def contents(folder: Path) -> dict[str, bytes]:
    # A pickle archive names the file it was first written to.
    return {str(p.relative_to(folder)): _loaded(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _loaded(path: Path) -> bytes:
    if path.suffix in (".ckpt", ".pt"):
        return repr({k: v.tolist() for k, v in torch.load(path, weights_only=True).items()}).encode()
    return path.read_bytes()


def test_a_file_that_a_killed_export_left_half_done_has_a_name_no_loader_takes(normed, options, tmp_path, monkeypatch
                                                                               ) -> None:
    seen = []

    def dies(self: object, path: Path, samples: object) -> None:
        path.write_bytes(b"half")
        seen.append(path)
        raise OSError("no space left")

    monkeypatch.setattr(LAYOUTS["specforge"], "write", dies)
    with pytest.raises(OSError, match="no space left"):
        export(normed, "specforge", tmp_path / "out", options)
    assert seen[0].name.startswith(".")
    assert seen[0].suffix == ".part"
    assert not list((tmp_path / "out").rglob("*.ckpt"))
    assert not seen[0].exists()


@pytest.mark.parametrize("trainer", ["speculators", "specforge", "deepspec", "axolotl"])
def test_a_full_disk_ends_in_one_error_and_leaves_no_file_that_a_loader_would_take(normed, options, tmp_path, trainer
                                                                                   ) -> None:
    # A limit on the size of files fails like a quota does, whoever writes: Python, torch, safetensors or Arrow.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        with pytest.raises(StorageFullError, match="free some room, then run the same command again"):
            export(normed, trainer, tmp_path / "out", options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == [RECORD]
    assert export(normed, trainer, tmp_path / "out", options).files_kept == 0


def test_the_report_counts_what_was_written_and_names_layers_on_both_sides(normed, options, tmp_path) -> None:
    report: ExportReport = export(normed, "automodel-eagle3", tmp_path / "out", options)
    assert (report.samples, report.tokens) == (PROMPTS, sum(t.num_tokens for t in traces()))
    assert (report.layers, report.layer_ids) == ((1, 2, 3), (0, 1, 2))
    assert report.cut_traces == sum(t.num_tokens - 1 > SEQ for t in traces()) > 0
    rows = np.concatenate([t.tail_mass_R for t in traces()])
    assert report.dropped_mass == pytest.approx(float(rows.mean()), rel=1e-5)
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.mark.parametrize(("shape", "trainer", "given", "says"), [
    ({"layers": ()}, "specforge", {}, "run generate with --layers 2,10,17,20"),
    ({"layers": (2, 10, 17)}, "specforge", {}, ("does not store layer 20, the last state, which specforge needs: run "
                                              "generate with --layers 2,10,17,20")),
    ({"layers": (2, 20)}, "angelslim", {}, "run generate with --layers 2,10,17,20"),
    ({"layers": (2, 10, 17, 20)}, "deepspec", {"layers": (3,)}, "does not store layers 3 that deepspec needs"),
    ({"layers": (2, 10, 17, 20)}, "deepspec", {"layers": (3,)}, "run generate with --layers 3,20"),
    ({"layers": (1, 2, 10, 17, 20)}, "specforge", {}, "takes exactly 3 auxiliary layers, not 1, 2, 10, 17: name them"),
    ({"layers": (2, 10, 17, 20)}, "modelopt", {"layers": (2, 20)}, "leave it out of --layers"),
    ({"layers": (0, 2, 10, 20)}, "specforge", {}, "has no number for layer 0"),
    ({"layers": (0, 2, 10, 20)}, "automodel-eagle3", {}, "has no number for layer 0"),
    ({"layers": (2, 10, 17, 20), "final_norm_eps": None}, "specforge", {}, "or export for a trainer that takes "),
    ({"layers": (2, 10, 17, 20), "architecture": "OddForCausalLM"}, "deepspec", {}, "how OddForCausalLM gets from"),
    ({}, "axolotl", {"top_k": 16}, "stores 8 head entries per row, not 16: run generate with --top-k 16"),
    ({"layers": (2, 10, 17, 20)}, "deepspec", {"dtype": "f32"}, "takes hidden states as bf16, not f32"),
    ({"layers": (2, 10, 17, 20)}, "specforge", {"dtype": "fp8"}, "takes hidden states as bf16 or f32, not fp8"),
    ({"layers": (2, 10, 17)}, "automodel-eagle3", {"draft_vocab": 10}, "statistics: run `distill-pipe finalize"),
    ({"layers": (2, 10, 17, 20)}, "modelopt", {"draft_vocab": 20}, "modelopt has no use for --draft-vocab"),
    ({"layers": (2, 10, 17, 20)}, "specforge", {"draft_vocab": 20}, "statistics: run `distill-pipe finalize"),
    ({"layers": (2, 10, 17)}, "automodel-eagle3", {"draft_vocab": 65}, "must be between 2 and 64"),
    ({"layers": (2, 10, 17)}, "automodel-eagle3", {}, "give the target's folder with --target"),
    ({}, "torchspec", {}, "unknown trainer 'torchspec': give one of speculators, specforge"),
])
def test_a_dataset_that_lacks_what_a_trainer_needs_is_refused_with_the_option_to_add(tmp_path, shape, trainer, given,
                                                                                     says) -> None:
    normed_dataset(tmp_path / "dataset", Shape(**{"num_layers": 20, "final_norm_eps": 1e-5} | shape), 2)
    with pytest.raises(UsageError) as refused:
        export(tmp_path / "dataset", trainer, tmp_path / "out", ExportOptions(**given))
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_in_an_object_store_is_exported_alike(exported, options, tmp_path) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    normed_dataset(place)
    export(place, "specforge", tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(exported("specforge"))


def test_deepspec_is_told_the_target_that_its_configuration_names(normed, options, exported, tmp_path) -> None:
    def named(folder: Path) -> str:
        return json.loads((folder / "manifest.json").read_bytes())["target_model_name_or_path"]

    assert named(exported("deepspec")) == str(options.target)
    report = export(normed, "deepspec", tmp_path / "out", ExportOptions(target=Path("/models/tiny")))
    assert "has to read /models/tiny" in report.notes[0]
    assert named(tmp_path / "out") == "/models/tiny"


def test_an_unfinished_dataset_is_refused(tmp_path) -> None:
    run: Run = start_run(tmp_path / "dataset", 8, SHAPE)
    with pytest.raises(UsageError, match=f"2 of {run.spec.num_shards} shards are missing; run generate again"):
        export(tmp_path / "dataset", "axolotl", tmp_path / "out")


def test_heldout_traces_stay_out_of_a_training_export(normed, options, tmp_path) -> None:
    def ids(split: str) -> list[list[int]]:
        given = ExportOptions(split=split, holdout_every=4)
        export(normed, "specforge", tmp_path / split, given)
        samples = pickled(tmp_path / split, "*.ckpt")
        assert len(samples) == export(normed, "specforge", tmp_path / split, given).samples
        return [sample["input_ids"].tolist() for sample in samples]

    kept = [[t.token_ids_T[:-1].tolist() for t in traces() if (t.ordinal % 4 == 3) == heldout]
            for heldout in (False, True)]
    assert [ids("train"), ids("heldout")] == kept
    with pytest.raises(MismatchError, match="split: stored train, given all"):
        export(normed, "specforge", tmp_path / "train", ExportOptions(holdout_every=4))
    for trainer in ("speculators", "deepspec"):
        export(normed, trainer, tmp_path / trainer, ExportOptions(split="train", holdout_every=4))
    assert len(datasets.load_from_disk(tmp_path / "speculators")) == len(kept[0])
    assert [row["input_ids"] for row in datasets.load_from_disk(tmp_path / "speculators").with_format(None)] == kept[0]
    assert (tmp_path / "deepspec" / "samples.idx").stat().st_size == 56 * len(kept[0])


def test_a_split_without_traces_is_refused(normed, tmp_path) -> None:
    with pytest.raises(UsageError, match="has no trace in the split 'heldout'"):
        export(normed, "axolotl", tmp_path / "out", ExportOptions(split="heldout", holdout_every=PROMPTS + 1))


def test_a_folder_that_a_call_left_before_it_wrote_anything_is_taken(normed, options, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".0123.part").write_text("half")
    assert export(normed, "specforge", tmp_path / "out", options).files_written == PROMPTS


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(normed, options, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and no export"):
        export(normed, "specforge", tmp_path / "out", options)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_another_export_into_the_same_folder_is_refused_with_what_differs(normed, options, exported) -> None:
    with pytest.raises(MismatchError, match="dtype: stored bf16, given f32"):
        export(normed, "specforge", exported("specforge"), ExportOptions(dtype="f32", seq_length=SEQ))
    with pytest.raises(MismatchError, match="trainer: stored specforge, given modelopt"):
        export(normed, "modelopt", exported("specforge"), options)


def test_a_missing_sidecar_ends_the_export_with_its_name(tmp_path) -> None:
    normed_dataset(tmp_path / "dataset")
    [gone, *_] = sorted((tmp_path / "dataset" / "hidden_states").rglob("*.parquet"))
    gone.unlink()
    with pytest.raises(DamageError, match=gone.name):
        export(tmp_path / "dataset", "specforge", tmp_path / "out")


def test_an_export_killed_outright_is_continued(normed, exported, options, tmp_path) -> None:
    killed = f"""
import os, signal
from pathlib import Path
from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import ExportOptions
export({str(normed)!r}, "specforge", {str(tmp_path / "out")!r}, ExportOptions(seq_length={SEQ}),
       lambda done, of: os.kill(os.getpid(), signal.SIGKILL) if done == 4 else None)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").rglob("*.ckpt"))) == 4
    assert export(normed, "specforge", tmp_path / "out", options).files_kept == 4
    assert contents(tmp_path / "out") == contents(exported("specforge"))
