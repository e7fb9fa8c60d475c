"""Kills, hangs and poison, on the fake target: nothing may be lost, doubled or other than an undisturbed run's.

Cases have the numbers of the fault matrix. `make test` runs the quick ones, `make faults` all of them.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fakes import SETTINGS, assert_same_rows, assert_whole, fake_job, quarantined, questions, run_here
from runs import command, prompt_records, write_corpus

from distill_pipe.produce.driver import GRACE_SECONDS
from faults.jobs import Disturber, commits, running, titled

pytestmark = pytest.mark.ray
PROMPTS, PER_SHARD = 160, 4
SHARDS = PROMPTS // PER_SHARD
FAULTS = {"DISTILL_PIPE_FAKE_FAULTS": "1"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here(fake_job(folder, "out", prompts=questions(PROMPTS)))
    return folder / "out"


@pytest.fixture(scope="module")
def corpus(undisturbed: Path) -> Path:
    return undisturbed.with_name("c.jsonl")


def assert_kept(out: Path, undisturbed: Path) -> None:
    assert_whole(out, PROMPTS, len(quarantined(out)))
    assert_same_rows(out, undisturbed)


def kill_at_random(corpus: Path, undisturbed: Path, folder: Path, kills: int, seed: int,
                   fault_row: Callable[..., None], *kinds: str) -> None:
    disturber = Disturber(corpus, folder, SHARDS, seed)
    for out in disturber.run(kills, kinds):
        assert_kept(out, undisturbed)
        # Two accidents that hit the same lone prompt look like poison.
        assert len(quarantined(out)) <= disturber.killed // 20
    names = " and ".join(kinds)
    fault_row(f"F18 F25 SIGKILL of {names} at random moments", disturber.killed, disturber.killed,
              seconds=disturber.seconds)
    print(f"{disturber.killed} kills of {names}, {len(disturber.outs)} datasets, seed {seed}")


def test_f18_workers_killed_at_random_moments_are_replaced(corpus, undisturbed, tmp_path, fault_row) -> None:
    kill_at_random(corpus, undisturbed, tmp_path, 8, time.time_ns(), fault_row, "worker")


def test_f19_f25_drivers_and_all_workers_killed_at_once_leave_a_run_that_continues(corpus, undisturbed, tmp_path,
                                                                                  fault_row) -> None:
    kill_at_random(corpus, undisturbed, tmp_path, 6, time.time_ns(), fault_row, "workers", "worker+driver")


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kinds", "kills"), [(("worker",), 150), (("driver",), 60), (("workers",), 50),
                                              (("worker+driver", "worker"), 60)])
def test_f18_f19_f25_three_hundred_kills(corpus, undisturbed, tmp_path, fault_row, kinds, kills) -> None:
    kill_at_random(corpus, undisturbed, tmp_path, kills, 1, fault_row, *kinds)


@pytest.mark.matrix
def test_f15_two_drivers_on_one_root_at_the_same_moment(tmp_path, fault_row) -> None:
    run_here(fake_job(tmp_path, "calm", prompts=questions(40)))
    out = tmp_path / "out"
    with running(tmp_path / "c.jsonl", out) as one, running(tmp_path / "c.jsonl", out) as other:
        one.end()
        other.end()
    assert_whole(out, 40)
    assert_same_rows(out, tmp_path / "calm")
    fault_row("F15 two drivers on one root at the same moment", 1, 1)


@pytest.mark.parametrize(("sent", "code", "says"), [
    pytest.param(signal.SIGINT, 130, "interrupted; the same command continues", marks=pytest.mark.faults),
    pytest.param(signal.SIGTERM, 143, "terminated; the same command continues", marks=pytest.mark.matrix)])
def test_f22_f27_a_signal_ends_a_run_with_its_code_and_the_same_command_continues(
        corpus, undisturbed, tmp_path, fault_row, sent, code, says) -> None:
    out = tmp_path / "out"
    # As a script starts what it runs in the background: Ctrl-C is not for that.
    wrapped = ("sh", "-c", 'trap "" INT; exec "$@"', "sh") if sent == signal.SIGTERM else ()
    with running(corpus, out, wrapped=wrapped) as job:
        job.wait_for_commits(out, 3)
        if wrapped:
            job.process.send_signal(signal.SIGINT)
        job.process.send_signal(sent)
        started = time.monotonic()
        job.end(code)
        assert says in job.says()
        assert "Traceback" not in job.says()
        job.wait_until_gone()
    assert time.monotonic() - started < GRACE_SECONDS + 30
    done = commits(out)
    assert 3 <= len(done) < SHARDS
    with running(corpus, out, env={"DISTILL_PIPE_FAKE_STEP_SECONDS": "0"}) as job:
        job.end()
    assert done.items() <= commits(out).items()
    assert_whole(out, PROMPTS)
    assert_same_rows(out, undisturbed)
    fault_row(f"F22 F27 {sent.name} to the driver", 1, 1, seconds=time.monotonic() - started)


# Poison


def poisoned(*marks: str, count: int = 16) -> list[str]:
    """Every fifth prompt from the second on is marked with one of these."""
    prompts = questions(count)
    for i, mark in enumerate(marks):
        prompts[1 + 5 * i] += f" [fault:{mark}]"
    return prompts


def assert_poison_found(folder: Path, prompts: list[str], marks: int, *args: object) -> None:
    run_here(fake_job(folder, "calm", "prompts_per_shard=2", prompts=prompts))
    with running(folder / "c.jsonl", folder / "out", "--set", "max_failed_share=1", "--set", "prompts_per_shard=2",
                 *args, env={**FAULTS, "DISTILL_PIPE_FAKE_STEP_SECONDS": "0"}) as job:
        job.end()
    assert quarantined(folder / "out") == [1 + 5 * i for i in range(marks)]
    assert_whole(folder / "out", len(prompts), marks)
    assert_same_rows(folder / "out", folder / "calm")


@pytest.mark.matrix
def test_f29_f30_a_prompt_that_kills_its_engine_is_found_and_every_other_is_kept(tmp_path, fault_row) -> None:
    assert_poison_found(tmp_path, poisoned("kill", count=8), 1)
    fault_row("F30 a prompt that kills the engine", 1, 1)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mark", "case"), [("exit", "F30 a prompt that ends the process"), (
    "hang", "F28 a prompt that hangs the engine"), ("memory", "F33 a prompt that takes all memory"), (
    "raise", "F29 a prompt on which the engine raises")])
def test_f28_f30_f33_poison_of_every_kind_is_found(tmp_path, fault_row, mark, case) -> None:
    assert_poison_found(tmp_path, poisoned(mark, mark), 2, "--set", "stall_seconds=5", "--workers", 2)
    fault_row(case, 1, 1)


@pytest.mark.faults
def test_f31_too_many_poisonous_prompts_end_the_run_with_3(tmp_path, fault_row) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records(poisoned("raise", "raise", "raise")))
    out = tmp_path / "out"
    with running(corpus, out, env=FAULTS) as job:
        job.end(3)
        assert "prompts failed in the engine or in capture" in job.says()
    done = commits(out)
    with running(corpus, out, "--set", "max_failed_share=1", env=FAULTS) as job:
        job.end()
    assert done.items() <= commits(out).items()
    assert_whole(out, 16, 3)
    fault_row("F31 more poison than a run allows", 3, 3)


# Hangs and zombies


@pytest.mark.faults
def test_f28_an_engine_that_stops_is_replaced(corpus, undisturbed, tmp_path, fault_row) -> None:
    out = tmp_path / "out"
    with running(corpus, out, "--set", "stall_seconds=4") as job:
        job.wait_for_commits(out)
        [engine] = job.engines()
        engine.suspend()
        stopped = time.monotonic()
        done = len(commits(out))
        job.wait_for_commits(out, done + 2)
        seconds = time.monotonic() - stopped
        assert not engine.is_running() or "_Replica" not in titled(engine)
        job.end()
    assert_kept(out, undisturbed)
    fault_row("F28 SIGSTOP of a worker", 1, 1, seconds=seconds)


@pytest.mark.faults
def test_f24_a_zombie_that_wakes_after_its_shard_was_done_again_changes_nothing(corpus, undisturbed, tmp_path,
                                                                                fault_row) -> None:
    out = tmp_path / "out"
    with running(corpus, out) as job:
        job.wait_for_commits(out)
        [zombie] = job.engines()
        # Its driver lives on, or Ray would end the engine before it wakes.
        zombie.suspend()
        with running(corpus, out, env={"DISTILL_PIPE_FAKE_STEP_SECONDS": "0"}) as heir:
            heir.end()
        done = commits(out)
        assert zombie.status() == psutil.STATUS_STOPPED
        zombie.resume()
        job.end()
    assert commits(out) == done
    assert_kept(out, undisturbed)
    fault_row("F24 a zombie wakes after its shard was done again", 1, 1)


# Refusals


@pytest.mark.matrix
def test_f16_a_driver_with_other_settings_is_refused_before_an_engine_starts(corpus, undisturbed, fault_row) -> None:
    done = command("generate", "--corpus", corpus, "--out", undisturbed, *SETTINGS, "--set", "sampling.seed=1")
    assert done.returncode == 4
    assert "sampling.seed: stored 0, given 1" in done.stderr
    fault_row("F16 a driver with other settings: refused", 1, 1)
