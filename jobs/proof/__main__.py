"""`make proof`: data, then trainings, then tables. Hours on two cores; it may be stopped at any time and goes on.

Every training runs in a process of its own on one core. Results are one file each, so the same command does what is
missing, and several machines can share the work by --only.
"""

import argparse
import fnmatch
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from jobs.proof.data import dataset_names, make_dataset, write_text
from jobs.proof.one import run_named
from jobs.proof.plan import CAPTURES, MAIN, RECODED, RENORMALISED, Scale, Training, trainings
from jobs.proof.report import write_report

POLL_SECONDS = 2.0


def main() -> None:
    given = _arguments()
    # So that trainings are stopped with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [t for t in trainings() if fnmatch.fnmatch(t.name, given.only)]
    scale = msgspec.convert(dict(setting.split("=", 1) for setting in given.set), Scale, strict=False)
    if given.list:
        for training in chosen:
            print(("done  " if _is_done(training, given.results) else "      ") + training.name)
        return
    if given.one:
        run_named(next(t for t in chosen if t.name == given.one), given.out, given.results, scale)
        return
    deadline = time.monotonic() + 60 * given.minutes if given.minutes else float("inf")
    left = [t for t in chosen if not _is_done(t, given.results)]
    if left:
        make_data(left, given.out, scale)
        _run_all(left, given, deadline)
    print(f"tables: {write_report(given.results)}")
    missing = [t.name for t in chosen if not _is_done(t, given.results)]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(chosen)} trainings are not done yet; the same command goes on")


def make_data(left: list[Training], folder: Path, scale: Scale) -> None:
    """What the trainings read, and what that is made from."""
    write_text(folder, scale)
    wanted = {MAIN, *(t.dataset for t in left)}
    if RENORMALISED in wanted:
        wanted.add("k64")
    if any(t.decode for t in left):
        wanted |= {name for name in dataset_names() if name not in (*CAPTURES, *RECODED, RENORMALISED)}
    for name in dataset_names():
        if name in wanted:
            print(f"dataset {name}", flush=True)
            make_dataset(name, folder, scale)


def _run_all(left: list[Training], given: argparse.Namespace, deadline: float) -> None:
    waiting, running = list(left), dict[str, subprocess.Popen[bytes]]()
    started = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < given.jobs and time.monotonic() < deadline:
                training = waiting.pop(0)
                running[training.name] = _start(training, given)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    running.pop(name)
                    say = "done" if process.returncode == 0 else f"failed with {process.returncode}"
                    print(f"{time.monotonic() - started:7.0f} s  {say}: {name}; {len(waiting)} wait", flush=True)
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)
    finally:
        # They go on from their last checkpoint.
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def _start(training: Training, given: argparse.Namespace) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", "jobs.proof", "--one", training.name, "--out", str(given.out), "--results",
            str(given.results), *(part for setting in given.set for part in ("--set", setting))]
    return subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"})  # noqa: S603 - our own command line


def _is_done(training: Training, results: Path) -> bool:
    return (results / f"{training.name}.json").exists()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.proof", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/proof"), help="datasets and drafts (12 GB)")
    parser.add_argument("--results", type=Path, default=Path("build/proof/results"), help="results and tables")
    parser.add_argument("--only", default="*", help="trainings whose name fits this pattern")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; 0 for never")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time, a core each")
    parser.add_argument("--list", action="store_true", help="say what there is to do")
    parser.add_argument("--set", action="append", default=[], help="another scale, e.g. steps=100")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
