"""The commands that look after a dataset and the place it lies in: verify, gc, selftest, and doctor.

Like `cli`, which gives them their names, they parse, call and print; each imports what it needs when it runs.
"""

import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table

from distill_pipe.errors import DamageError, UsageError
from distill_pipe.options import Json, Root
from distill_pipe.report_tables import print_facts, print_table, say
from distill_pipe.store.root import open_root

if TYPE_CHECKING:
    from distill_pipe.store.verify import CheckStates


def verify(
    root: Root,
    deep: Annotated[bool, typer.Option("--deep", help="Also count again what was measured, decode every hidden state, "
                                                      "and add up the summary.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Write fragments, token tables and summary anew where they "
                                                          "are missing or wrong. Data is never touched.")] = False,
    as_json: Json = False,
) -> None:
    """Read a whole dataset and check it: hashes, checksums, invariants, and every prompt exactly once."""
    from distill_pipe.store.verify import verify as verify_dataset

    report = verify_dataset(open_root(root), deep=deep, repair=repair, check_states=_state_check() if deep else None)
    print_facts(report, as_json)
    if not report.clean:
        raise DamageError(f"{root}: {len(report.problems)} problems, {report.missing_prompts} prompts missing, "
                          f"{report.doubled_prompts} doubled")


def gc(
    root: Root,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed; without it nothing is touched."
                                         )] = False,
    grace: Annotated[float, typer.Option(min=1, help="Leave alone what is younger, in hours. A shard must never take "
                                                     "longer.")] = 24.0,
    as_json: Json = False,
) -> None:
    """List files that nothing refers to: sidecars of lost attempts, old scratch. Deletes them only with --delete."""
    from distill_pipe.store.orphans import collect_garbage

    found = collect_garbage(open_root(root), delete=delete, grace_seconds=grace * 3600)
    if as_json:
        print_facts(found, as_json)
        return
    for name in found.files:
        sys.stdout.write(f"{name}\n")
    for name in found.unreadable:
        say(f"{name} cannot be read, so none of its files was considered; see verify")
    for note in found.notes:
        say(f"note: {note}")
    done = "deleted" if delete else "would be deleted with --delete"
    say(f"{len(found.files)} files of {found.bytes / 1e6:,.2f} MB {done}; {found.young} more are younger than "
        f"{grace:g} h")


def selftest(
    output: Annotated[str, typer.Option(help="The folder or address to try out.")],
    as_json: Json = False,
) -> None:
    """Try out whether a store keeps what a dataset rests on: races for a name, reads, listings. Ends in 2 if not."""
    from distill_pipe.store.selftest import selftest as try_store

    found = try_store(open_root(output))
    if as_json:
        print_facts(found, as_json)
    else:
        table = Table(box=None)
        for column in ("", "tried", "seconds", "found"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        for probe in found.probes:
            mark = "ok" if probe.passed else "FAILED" if probe.needed else "no"
            table.add_row(mark, probe.name, f"{probe.seconds:.2f}", probe.detail)
        print_table(table)
    if found.failed:
        raise UsageError(f"{output} cannot hold a dataset safely: {'; '.join(found.failed)}; use another store")


def doctor(as_json: Json = False) -> None:
    """Say what this machine has: versions, devices, room, limits. Secrets are only said to be set."""
    from distill_pipe.machine import examine

    facts = examine()
    if as_json:
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
        return
    table = Table(box=None, show_header=False)
    for fact in facts:
        table.add_row(fact.name, fact.value, f"! {fact.advice}" if fact.advice else "")
    print_table(table)


def _state_check() -> "CheckStates | None":
    try:
        from distill_pipe.store.hidden_codec import require_finite
    except ImportError:
        say("hidden states are not decoded: that needs torch")
        return None
    return require_finite
