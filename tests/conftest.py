"""Datasets that several test files read, each made once by the real command line; and what of the machine must not
reach the tests."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from runs import GENERATE, LONG_PROMPT, PROMPTS, SCORE, prompt_records, succeed, write_corpus

# How fast an example runs says something about the machine and its other users, and nothing about the code. And which
# examples are tried does not depend on the machine: what fails there must fail here.
settings.register_profile("any-machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

# Every server that a test talks to is one of its own.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"127.0.0.1,localhost,{os.environ.get('NO_PROXY', '')}".rstrip(",")
# Ray makes its workers give way to everything else, and the tests beside them would starve engines.
os.environ.setdefault("RAY_worker_niceness", "0")
# Each makes Rich colour what is not printed on a terminal.
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE"):
    os.environ.pop(_name, None)

# What a script runs in its background ignores Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The table of faults, and the servers that some of them need.
pytest_plugins = ["faults.table", "faults.seaweed", "faults.azurite", "faults.fake_gcs"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Two processes run the tests of `make test`; see `processes` for which files go where."""
    from processes import EnginesInOneProcess

    return EnginesInOneProcess(config, log)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call `distill-pipe` in this process: exit code, stdout, stderr."""
    from distill_pipe.cli import main

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["distill-pipe", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses written by the float32 target, captured while it decodes; two shards in flight. The last prompt does
    not fit the context."""
    folder = tmp_path_factory.mktemp("generated")
    corpus = write_corpus(folder / "c.jsonl", prompt_records((*PROMPTS, LONG_PROMPT)))
    succeed("generate", "--corpus", corpus, "--out", folder / "out", *GENERATE)
    return folder / "out"


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Given responses scored by the float32 target; one conversation has two turns."""
    folder = tmp_path_factory.mktemp("scored")
    records: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
                      {"role": "user", "content": "Another one, please."},
                      {"role": "assistant", "content": "Green, like the moss on an old wall."}]},
        {"prompt": "Count to ten.", "completion": "One, two, three, four, five, six, seven, eight, nine, ten."},
    ]
    corpus = write_corpus(folder / "c.jsonl", records)
    succeed("generate", "--corpus", corpus, "--out", folder / "out", *SCORE)
    return folder / "out"
