"""`distill-pipe export` as its user meets it: facts on stdout, all else on stderr, and one line for a mistake."""

import json

import pytest
from export_datasets import PROMPTS, normed_dataset
from tiny_datasets import Shape

from distill_pipe.consume.exporters import LAYOUTS
from distill_pipe.export_commands import Trainers


def test_every_layout_can_be_asked_for() -> None:
    assert [t.value for t in Trainers] == list(LAYOUTS)


def test_an_export_says_what_it_did_and_how_the_trainer_numbers_the_layers(cli, tmp_path) -> None:
    normed_dataset(tmp_path / "dataset")
    code, out, err = cli("export", tmp_path / "dataset", "--to", "specforge", "--out", tmp_path / "out")
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert lines[0].split() == ["10%", "1", "of", "10", "samples"]
    assert f"{PROMPTS} samples of" in lines[-1]
    assert "10 files written, 0 were there; auxiliary layers in its numbering: 0, 1, 2" in lines[-1]


def test_what_a_renormalising_trainer_loses_is_said_once_and_is_in_the_facts(cli, tmp_path) -> None:
    normed_dataset(tmp_path / "dataset")
    code, out, err = cli("export", tmp_path / "dataset", "--to", "axolotl", "--out", tmp_path / "out", "--json")
    facts = json.loads(out)
    assert (code, facts["samples"], facts["files_written"]) == (0, PROMPTS, 1)
    assert err.count(f"{facts['dropped_mass']:.1%} of the probability, the mean mass outside it, is dropped") == 1


@pytest.mark.parametrize(("options", "code", "says"), [
    (["--to", "specforge", "--layers", "1,2"], 2, "specforge takes exactly 3 auxiliary layers, not 1, 2"),
    (["--to", "specforge", "--layers", "none"], 2, "needs at least one"),
    (["--to", "speculators", "--layers", "one"], 2, "write numbers with commas"),
    (["--to", "automodel-dspark"], 2, "give the target's folder with --target"),
    (["--to", "axolotl", "--out", "s3://bucket/export"], 2, "an export is written to a local folder"),
    (["--to", "deepspec", "--dtype", "f32"], 2, "deepspec takes hidden states as bf16"),
])
def test_a_mistake_gets_one_line_with_the_fix(cli, tmp_path, options, code, says) -> None:
    normed_dataset(tmp_path / "dataset", num_prompts=2)
    found, out, err = cli("export", tmp_path / "dataset", "--out", tmp_path / "out", *options)
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_dataset_is_named(cli, tmp_path) -> None:
    code, _, err = cli("export", tmp_path, "--to", "axolotl", "--out", tmp_path / "out")
    assert code == 4
    assert "it has no run.json" in err


def test_a_dataset_without_states_still_feeds_trainers_of_heads(cli, tmp_path) -> None:
    normed_dataset(tmp_path / "dataset", Shape(layers=()))
    assert cli("export", tmp_path / "dataset", "--to", "distillkit", "--out", tmp_path / "out")[0] == 0
    code, _, err = cli("export", tmp_path / "dataset", "--to", "speculators", "--out", tmp_path / "other")
    assert code == 2
    assert "does not store the auxiliary layers that speculators needs (it stores none): run generate with" in err
