"""Catches a training command that says something else than it did, or that several processes started by torchrun
do not share."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_drafts import write_bigrams, write_target

from distill_pipe.consume.train import Step
from distill_pipe.train_commands import Bar

LITTLE = ("--steps", 12, "--positions", 2, "--batch-tokens", 128, "--lr", 0.01)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigrams(tmp_path_factory.mktemp("bigrams"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def test_the_command_trains_what_it_was_told_and_prints_it(cli, root, target, tmp_path) -> None:
    code, out, err = cli("train", root, "--target", target, "--arch", "mtp", "--loss", "lk-alpha", "--tail", "bucket",
                         "--draft-vocab", 20, "--out", tmp_path, "--json", *LITTLE)
    found = json.loads(out)
    assert (code, found["steps"], found["draft_vocab"], len(found["after"])) == (0, 12, 20, 2)
    assert json.loads((tmp_path / "draft.json").read_text())["arch"] == "mtp"
    assert err.splitlines()[-1].startswith("100%  step 12  loss ")
    code, out, err = cli("train", root, "--target", target, *LITTLE)
    assert code == 0
    assert all(word in out for word in ("position", "held-out alpha before", "certified between"))
    assert "12 steps over" in err


@pytest.mark.parametrize(("there", "out", "says"), [
    ("config.json", ".", "holds config.json of another model; give another folder"),
    ("draft", "draft", "cannot be written: File exists; give another folder"),
    ("draft", "draft/inside", "cannot be written: Not a directory; give another folder"),
])
def test_a_training_that_could_not_save_its_draft_does_not_begin(cli, root, target, tmp_path, there, out, says) -> None:
    (tmp_path / there).write_text("mine")
    code, _, err = cli("train", root, "--target", target, "--out", tmp_path / out, *LITTLE)
    assert (code, len(err.splitlines())) == (2, 1)
    assert says in err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(there, "mine")]


def test_a_table_of_an_evaluation_has_every_domain_and_length(cli, root, target, tmp_path) -> None:
    cli("train", root, "--target", target, "--out", tmp_path, *LITTLE)
    code, out, err = cli("evaluate", root, "--draft", tmp_path, "--target", target, "--temperature", 1)
    assert code == 0
    assert all(word in out for word in ("general", "code", "all", "tau", "certified between"))
    assert "T = 1: the text is a sample of the target" in err


@pytest.mark.parametrize(("options", "says"), [
    (["--kl-share", "2"], "kl-share"),
    (["--checkpoint-every", "5"], "--out"),
    (["--draft-vocab", "0"], "draft-vocab"),
    (["--lr", "0"], "lr"),
])
def test_a_bad_option_is_named(cli, root, target, options, says) -> None:
    code, out, err = cli("train", root, "--target", target, *LITTLE, *options)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.parametrize(("option", "value"), [("--temperature", "-1"), ("--k", "0")])
def test_a_bench_of_nothing_is_refused(cli, tmp_path, option, value) -> None:
    code, out, err = cli("bench-draft", "--draft", tmp_path, option, value)
    assert (code, out) == (2, "")
    assert option in err


def test_logs_without_tensorboard_are_refused_in_one_line(cli, root, target, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = cli("train", root, "--target", target, "--log-dir", tmp_path / "logs", *LITTLE)
    assert (code, err.splitlines()) == (2, ["error: --log-dir needs TensorBoard: pip install tensorboard"])


def test_logs_hold_loss_rate_and_acceptance_of_each_position(cli, root, target, tmp_path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert cli("train", root, "--target", target, "--log-dir", tmp_path, *LITTLE)[0] == 0
    logged = events.EventAccumulator(str(tmp_path)).Reload()
    assert set(logged.Tags()["scalars"]) == {"loss", "lr", "alpha/1", "alpha/2"}
    assert [event.step for event in logged.Scalars("loss")] == list(range(1, 13))


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    with Bar(Console(file=screen, force_terminal=True, width=120)) as bar:
        bar.update(Step(step=7, progress=0.5, rows=3, loss=0.25, lr=0.1, alphas=(0.5, 0.25)))
    assert "step 7" in screen.getvalue()
    assert "loss 0.2500  alpha 0.500 .. 0.250" in screen.getvalue()


def test_torchrun_starts_ranks_that_print_once(root, target, tmp_path) -> None:
    # By its own name a machine does not always find itself.
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc-per-node", "2", "--no-python", sys.executable, "-m", "distill_pipe.cli", "train", root, "--target",
            target, "--out", tmp_path, "--json", *LITTLE]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["steps"], (tmp_path / "model.safetensors").exists()) == (12, True)
