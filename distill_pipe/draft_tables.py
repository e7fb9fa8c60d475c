"""How the facts about a draft are shown: one JSON object, or tables that fit a terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from rich.table import Table

from distill_pipe.report_tables import print_table, say

if TYPE_CHECKING:
    from distill_pipe.consume.evaluate import Evaluation
    from distill_pipe.consume.train import TrainResult
    from distill_pipe.speculative.bench import DraftBench


def print_training(result: "TrainResult", as_json: bool) -> None:
    """Held-out acceptance by position, before and after."""
    if as_json:
        _json(result)
        return
    rows = [[str(position), f"{before.alpha:.4f}", f"{after.alpha:.4f}", f"{after.lower:.4f} - {after.upper:.4f}",
             f"{after.rows:,}"]
            for position, (before, after) in enumerate(zip(result.before, result.after, strict=True), 1)]
    _table(["position", "held-out alpha before", "after", "certified between", "rows"], rows)
    say(f"{result.parameters:,} weights, {result.steps} steps over {result.rows:,} rows in {result.seconds:.0f} s, "
        f"loss {result.loss_first:.4f} -> {result.loss_last:.4f}")


def print_evaluation(found: "Evaluation", as_json: bool) -> None:
    """Acceptance by position and tokens per step, by temperature and domain."""
    if as_json:
        _json(found)
        return
    alphas = [[f"{d.temperature:g}", d.domain or "all", str(p.position), f"{p.rows:,}",
               f"{p.alpha.mean:.4f} ± {p.alpha.error:.4f}", f"{p.lower:.4f} - {p.upper:.4f}"]
              for d in found.domains if d.domain is None for p in d.positions]
    _table(["T", "domain", "position", "rows", "alpha", "certified between"], alphas)
    taus = [[f"{d.temperature:g}", d.domain or "all", str(length.drafted), f"{length.anchors:,.0f}",
             f"{length.tau.mean:.3f} ± {length.tau.error:.3f}"] for d in found.domains for length in d.lengths]
    _table(["T", "domain", "drafted", "steps", "tau"], taus)
    for temperature, assumption in found.assumptions.items():
        say(f"T = {temperature:g}: {assumption}")


def print_bench(found: "DraftBench", as_json: bool) -> None:
    """Tokens per step that were counted, by temperature, domain and number of drafted tokens."""
    if as_json:
        _json(found)
        return
    _table(["T", "domain", "drafted", "prompts", "steps", "tau", "95 % interval"],
           [[f"{c.temperature:g}", c.domain or "all", str(c.drafted), str(c.prompts), f"{c.steps:,}", f"{c.tau:.3f}",
             f"{c.low:.3f} - {c.high:.3f}"] for c in found.counts])
    if found.vllm:
        say(f"vLLM, T = 0, {found.vllm.drafted} drafted: tau {found.vllm.tau:.3f} over {found.vllm.steps:,} steps")


def _json(facts: msgspec.Struct) -> None:
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 1 else "right")
    for row in rows:
        table.add_row(*row)
    print_table(table)
