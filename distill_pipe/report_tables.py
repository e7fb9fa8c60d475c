"""How facts are shown on stdout: one JSON object, or tables that fit a terminal.

Text is for people and may change; scripts read `--json`, whose fields are those of the records. Nothing is cut off to
fit: a narrow terminal shows long names over several lines.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table

from distill_pipe.store.inspect import InspectedToken

if TYPE_CHECKING:
    from distill_pipe.produce.comparison import AuditReport
    from distill_pipe.produce.forecast import Forecast
    from distill_pipe.produce.gauge import Gauge
    from distill_pipe.produce.memory import Memory
    from distill_pipe.produce.probe import Probe
    from distill_pipe.produce.throughput import Throughput
    from distill_pipe.store.finalize import Final

# Columns of a table that nobody's terminal limits.
_UNBROKEN = 100_000


def print_facts(facts: msgspec.Struct, as_json: bool) -> None:
    """A record of plain facts, one per line."""
    if as_json:
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
        return
    table = Table(show_header=False, box=None)
    for name in facts.__struct_fields__:
        value = getattr(facts, name)
        if isinstance(value, tuple):
            value = ("\n" if value and isinstance(value[0], str) else ", ").join(map(str, value)) or "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{count} {what}" for what, count in value.items()) or "none"
        elif isinstance(value, float):
            value = f"{value:,.4g}"
        elif value is None:
            value = "-"
        table.add_row(name.replace("_", " "), str(value))
    print_table(table)


def print_table(table: Table) -> None:
    """A table on stdout, whole: folded on a narrow terminal, unbroken where a file or a pipe takes it."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = _UNBROKEN
    for column in table.columns:
        column.overflow = "fold"
    console.print(table, highlight=False, markup=False)


def say(text: str) -> None:
    """A line on stderr, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def visible(text: str) -> str:
    """Text from a model with control characters escaped, so that it cannot steer the terminal."""
    return repr(text)[1:-1]


def print_statistics(final: "Final", as_json: bool) -> None:
    """What a dataset adds up to."""
    if as_json:
        print_facts(final, as_json)
        return
    found = final.statistics
    table = Table(show_header=False, box=None)
    for name in ("shards", "prompts", "traces", "quarantined", "tokens", "rows", "bytes"):
        table.add_row(name, f"{getattr(found, name):,}")
    table.add_row("mean mass outside the head", f"{found.tail_mass_mean:.4f}")
    table.add_row("rounding error of the head, mean and max", f"{found.head_tv_error_mean:.2g}, "
                  f"{found.head_tv_error_max:.2g} (total variation)")
    for error in found.hidden:
        table.add_row(f"codec error of layer {error.layer}, mean and max", f"{error.mean:.2%}, {error.max:.2%}")
    for part in found.coverage:
        table.add_row(f"a draft vocabulary of {part.size:,} covers",
                      f"{part.mass:.2%} of the probability, {part.tokens:.2%} of the tokens")
    print_table(table)


def print_trace(rows: Sequence[InspectedToken], decode: Callable[[int], str], ordinal: int) -> None:
    """One trace, a line per token."""
    table = Table(title=f"trace {ordinal}")
    for column in ("position", "token", "supervised", "likeliest next tokens", "tail mass"):
        table.add_column(column, justify="right" if column in ("position", "tail mass") else "left")
    for row in rows:
        likely = "  ".join(f"{decode(token)} {p:.3f}" for token, p in row.candidates)
        table.add_row(str(row.position), decode(row.token_id), "yes" if row.supervised else "", likely,
                      "" if row.tail_mass is None else f"{row.tail_mass:.3f}")
    print_table(table)


def print_audit(found: "AuditReport", as_json: bool) -> None:
    """How far stored rows are from the replayed target."""
    if as_json:
        print_facts(found, as_json)
        return
    numbers = _figures("stored number", "entries", "mean error", "largest", "rounding", "mean beyond it", "largest")
    for number in found.numbers:
        numbers.add_row(number.column, f"{number.entries:,}", *_short(
            number.mean, number.max, number.rounding, number.beyond_mean, number.beyond_max))
    layers = _figures("layer", "positions", "mean error", "largest", "codec's mean", "codec's largest")
    for layer in found.layers:
        layers.add_row(str(layer.layer), f"{layer.positions:,}", *_short(
            layer.mean, layer.max, layer.codec_mean, layer.codec_max))
    for part in (_pairs(_audit_facts(found)), numbers, *([layers] if found.layers else [])):
        print_table(part)


def _audit_facts(found: "AuditReport") -> dict[str, str]:
    nonfinite = (f"{found.nonfinite_rows:,} in rows, {found.nonfinite_states:,} in states, "
                 f"{found.nonfinite_differences:,} differences")
    return {
        "target": f"{found.target}, {found.engine_dtype} in the engine",
        "weights": "those of the dataset" if found.revision_checked else "a commit beside a folder: not identified",
        "replayed": f"{len(found.ordinals):,} traces, {found.rows:,} rows, in {found.dtype} on {found.device}",
        "top-1 agreement": f"{found.top1_agreement:.2%}, and {found.top1_ties:.2%} ties",
        "1 - alpha, mean and largest": f"{found.alpha_drift_mean:.4f}, {found.alpha_drift_max:.4f}",
        "NaN or infinite": nonfinite,
        "limits": f"{found.max_logprob_error:.3g} beyond rounding, {found.max_hidden_error:.3g} beyond the codec",
    }


def print_gauge(found: "Gauge", as_json: bool) -> None:
    """What capture costs, and where its time goes."""
    if as_json:
        print_facts(found, as_json)
        return
    times, seconds = found.times, found.captured_seconds
    facts = {
        "requests": f"{found.requests:,}: {found.tokens:,} tokens, {found.rows:,} rows of {found.bytes_per_row:,.0f} B",
        "plain": f"{found.plain_tokens_per_second:,.0f} tokens/s",
        "with capture": f"{found.capture_tokens_per_second:,.0f} tokens/s",
        "captured over plain": f"{found.ratio:.3f} (rounds: "
                               f"{', '.join(f'{r.capture / r.plain:.3f}' for r in found.rounds)})",
    }
    parts = _figures("where the captured time went", "seconds", "share")
    for name, part in (("the engine's thread, picking and reducing rows", times.step_seconds),
                       ("the engine's thread, waiting for the sink", times.sink.engine_waited_seconds),
                       ("the sink's thread, putting traces together", times.sink.assemble_cpu_seconds),
                       ("the sink's thread, encoding", times.sink.encode_cpu_seconds),
                       ("the sink's thread, writing and committing", times.sink.commit_cpu_seconds)):
        parts.add_row(name, f"{part:.2f}", f"{part / seconds:.1%}")
    for table in (_pairs(facts), parts):
        print_table(table)


def _short(*figures: float) -> tuple[str, ...]:
    return tuple(f"{figure:.2g}" for figure in figures)


def _figures(name: str, *columns: str) -> Table:
    table = Table(box=None)
    table.add_column(name)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def print_forecast(found: "Forecast", as_json: bool) -> None:
    """What a run will cost."""
    if as_json:
        print_facts(found, as_json)
        return
    for part in (_pairs(_run_facts(found)), _column_table(found), _codec_table(found),
                 _pairs(_memory_facts(found.memory, found.layout), "each engine")):
        print_table(part)
    for note in found.notes:
        sys.stdout.write(f"- {note}\n")


def _pairs(facts: Mapping[str, str], title: str | None = None) -> Table:
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _run_facts(found: "Forecast") -> dict[str, str]:
    unusable = f"{found.prompts_too_long:,} too long, {found.prompts_refused:,} refused by the chat template"
    head = f"{found.top_k} entries"
    if found.coverage is not None:
        head = f"entries for {found.coverage:.4g} of the probability, at most {found.top_k}"
    facts = {
        "target": found.target,
        "prompts": f"{found.prompts:,} ({found.prompts_measured:,} measured; {unusable})",
        "shards": f"{found.shards:,}, {found.shards_left:,} to make",
        "tokens": f"{found.tokens:,}",
        "supervised rows": f"{found.rows:,}",
        "rows per prompt": f"{found.response_tokens_mean:,.1f} (from {found.response_tokens_from})",
        "layers": ", ".join(map(str, found.layers)) or "none",
        "head and tail": f"{head}; {found.tail_samples} samples",
        "dataset": f"{_size(found.bytes)}: {found.bytes_per_token:,.0f} B per token, {found.bytes_per_row:,.0f} a row",
        "on disk": f"{_size(found.disk_bytes)} with plan and records; "
                   f"{'not checked' if found.free_bytes is None else _size(found.free_bytes) + ' free'}",
    }
    if found.disk_bytes_longest > found.disk_bytes:
        facts["at the longest"] = f"{_size(found.disk_bytes_longest)} on disk, if every response reached max_tokens"
    if found.throughput is not None:
        facts |= _throughput_facts(found.throughput)
    if found.probe is not None:
        facts |= _probe_facts(found.probe)
    return facts | {"fingerprint": found.fingerprint or "- (the engine or the target's files are not here)"}


def _throughput_facts(speed: "Throughput") -> dict[str, str]:
    return {"tokens per second": f"{speed.prefill_tokens_per_second:,.0f} read, {speed.decode_tokens_per_second:,.0f} "
                                 "written, by each engine (estimated)",
            "hours for the run": f"{speed.hours:,.2f} (estimated)"}


def _probe_facts(probe: "Probe") -> dict[str, str]:
    lengths = ", ".join(map(str, probe.response_tokens))
    return {"probe": f"{probe.prompts} prompts, {probe.tokens:,} tokens at {probe.tokens_per_second:,.0f} per second",
            "hours for the run": f"{probe.hours:,.3f}",
            "response tokens": f"{lengths} (shortest, quartiles, longest)"}


def _column_table(found: "Forecast") -> Table:
    table = Table(box=None)
    for name in ("column", "bytes", "rate", "per"):
        table.add_column(name, justify="right" if name in ("bytes", "rate") else "left")
    for column in found.columns:
        table.add_row(column.column, _size(column.bytes), f"{column.rate:,.2f}", column.per)
    for name, size in (("footers", found.footer_bytes), ("records", found.record_bytes), ("plan", found.plan_bytes)):
        table.add_row(name, _size(size), f"{size / found.shards:,.0f}", "shard")
    for layer in found.hidden_layers:
        table.add_row(layer.column, _size(layer.bytes), f"{layer.rate:,.2f}", layer.per)
    return table


def _codec_table(found: "Forecast") -> Table:
    table = Table(box=None)
    for name in ("hidden codec", "states", "on disk", ""):
        table.add_column(name, justify="right" if name in ("states", "on disk") else "left")
    for codec in found.codecs:
        chosen = found.layers and codec.codec == found.hidden_codec
        table.add_row(codec.codec, _size(codec.hidden), _size(codec.total), "chosen" if chosen else "")
    return table


def _memory_facts(memory: "Memory", layout: str) -> dict[str, str]:
    device, room = memory.device, "not checked"
    if device.bytes is not None:
        room = f"{_gib(device.bytes)}, room for {memory.fitting_sequences or 0:,} sequences of mean length"
    batch, least = _gib(memory.kv_batch), _gib(memory.kv_least)
    each = memory.devices_per_engine
    return {
        "layout": f"{layout}, {memory.dtype}",
        "weights": f"{_gib(memory.weights)}{' in ' + memory.quantization if memory.quantization else ''} "
                   f"(from {memory.weights_from})",
        "KV cache": f"{memory.kv_per_token:,} B per token; {batch} for a full batch, {least} for one longest sequence",
        "capture": f"{_gib(memory.logits)} of logits and {_gib(memory.states)} of states on each device, "
                   f"{_gib(memory.host)} on the host",
        "on each device": f"{_gib(memory.weights / each)} of weights, {_gib(memory.kv_batch / each)} of cache, "
                          f"{_gib(memory.capture)} to capture",
        "device": f"{room} ({device.source})",
    }


def _size(size: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit, width in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= width:
            return f"{size / width:,.2f} {unit}"
    return f"{size:,.0f} B"


def _gib(size: float) -> str:
    return f"{size / (1 << 30):,.2f} GiB"
