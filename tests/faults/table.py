"""What was injected and what came of it, as one table: `pytest --fault-table FILE` writes it as Markdown.

A test reports through the fixture `fault_row`. Rows travel with the test's report, so that they arrive from whichever
process ran it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ROW = "fault_row"
_HEAD = ("| case | injections | survived | prompts lost | prompts doubled | seconds to recover |\n"
         "|---|---|---|---|---|---|\n")
_rows = pytest.StashKey[list[list[Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, default=None, help="write what the fault tests did to this file")


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`fault_row(case, injections, survived, lost=0, doubled=0, seconds=None)`: a row of the table. `case` starts with
    its F-number; `survived` counts the injections after which the dataset was whole; `seconds` is the longest time
    from an injection to the finished run, where that was measured."""
    def add(case: str, injections: int, survived: int, lost: int = 0, doubled: int = 0,
            seconds: float | None = None) -> None:
        request.node.user_properties.append((_ROW, [case, injections, survived, lost, doubled, seconds]))

    return add


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    # Under pytest-xdist every process has this plugin, and the one that started the others hears of all tests.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config), "fault-table")


class _Collector:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rows = [value for name, value in report.user_properties if name == _ROW]
        path = self._config.getoption("--fault-table")
        if report.when != "call" or path is None or not rows:
            return
        self._config.stash[_rows] += rows
        # After each test, for what is stopped in its second hour leaves the table of the first.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table_of(self._config.stash[_rows]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if rows := self._config.stash[_rows]:
            terminalreporter.write_line("\n" + table_of(rows))


def table_of(rows: list[list[Any]]) -> str:
    """The rows as Markdown, by case, with their sum."""
    lines = []
    for case, injections, survived, lost, doubled, seconds in sorted(rows, key=lambda row: str(row[0])):
        when = "-" if seconds is None else f"{seconds:.1f}"
        lines.append(f"| {case} | {injections} | {survived} | {lost} | {doubled} | {when} |\n")
    total = [sum(row[i] for row in rows) for i in range(1, 5)]
    return _HEAD + "".join(lines) + "| **all** | " + " | ".join(map(str, total)) + " | |\n"
