"""`distill-pipe targets`: the targets known by name, and all that is known of one. Needs no network and no engine."""

import sys
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from distill_pipe.errors import UsageError
from distill_pipe.options import Json
from distill_pipe.produce.gpus import GPUS, GPUS_PER_NODE
from distill_pipe.produce.layers import resolve_layers
from distill_pipe.produce.layouts import GIB, describe
from distill_pipe.produce.model_config import count_parameters
from distill_pipe.produce.preset import Preset, load_preset, preset_names
from distill_pipe.report_tables import print_table, say

targets = typer.Typer(no_args_is_help=True, help="The targets known by name.", rich_markup_mode=None)


class TargetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A preset with what follows from it: parameters, bytes of the weights in the engine, and layers as numbers."""

    name: str
    parameters: int | None
    active_parameters: int | None
    weight_bytes: int | None
    eagle3_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    preset: Preset


class TargetList(msgspec.Struct, frozen=True, kw_only=True):
    """What `targets list --json` prints."""

    targets: tuple[TargetFacts, ...]


@targets.command("list")
def list_targets(as_json: Json = False) -> None:
    """All presets: ours, and those of the folder that DISTILL_PIPE_TARGETS names."""
    found = TargetList(targets=tuple(map(_facts, preset_names())))
    if as_json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        return
    table = Table(box=None)
    for column in ("target", "parameters", "weights", *GPUS):
        table.add_column(column, justify="left" if column == "target" else "right", no_wrap=True)
    for target in found.targets:
        layouts = (_short(target.preset, gpu) for gpu in GPUS)
        table.add_row(target.name, _billions(target.parameters), _gib(target.weight_bytes), *layouts)
    print_table(table)
    say("GPUs that one engine takes; 2x8 are two machines. `targets show NAME` tells the rest")


@targets.command()
def show(name: Annotated[str, typer.Argument(help="One of `targets list`.")], as_json: Json = False) -> None:
    """Everything that a preset says."""
    if name not in preset_names():
        raise UsageError(f"unknown target {name!r}; known are {', '.join(preset_names())}")
    target = _facts(name)
    if as_json:
        sys.stdout.write(msgspec.json.encode(target).decode() + "\n")
        return
    table = Table(show_header=False, box=None)
    for label, value in _shown(target).items():
        table.add_row(label, value)
    print_table(table)


def _facts(name: str) -> TargetFacts:
    preset = load_preset(name) or Preset(model=name)
    config = preset.config
    if config is None:
        return TargetFacts(name=name, parameters=None, active_parameters=None, weight_bytes=None, eagle3_layers=(),
                           mtp_layers=(), preset=preset)
    counted, depth = count_parameters(config), config.num_hidden_layers or 0
    dtype = "bfloat16" if preset.dtype == "auto" else preset.dtype
    return TargetFacts(name=name, parameters=counted.total, active_parameters=counted.active,
                       weight_bytes=counted.weight_bytes(dtype, preset.quantization),
                       eagle3_layers=resolve_layers(preset.layers, depth),
                       mtp_layers=resolve_layers(preset.mtp_layers, depth), preset=preset)


def _shown(target: TargetFacts) -> dict[str, str]:
    preset = target.preset
    cannot = {"hidden states": preset.limits.states, "hidden states over pipeline stages":
              preset.limits.pipelined_states, "embeddings (layer 0)": preset.limits.embeddings}
    facts = {
        "model": f"{preset.model}, revision {preset.revision or 'of the day (frozen by the first run)'}",
        "licence": f"{preset.licence or 'unknown'}{f'; {preset.access}' if preset.access else ''}",
        "parameters": f"{_billions(target.parameters)}, {_billions(target.active_parameters)} for each token",
        "weights": f"{_gib(target.weight_bytes)} in {preset.quantization or preset.dtype}",
        "default context": f"{preset.max_model_len or '-'} tokens",
        "layers for EAGLE-3": f"{_numbers(target.eagle3_layers)} (--layers {preset.layers})",
        "layers for MTP": f"{_numbers(target.mtp_layers)} (--layers {preset.mtp_layers})",
        "chat template": preset.chat_template or "-",
        "reasoning": preset.reasoning or "none",
        "sampling": ", ".join(f"{name} {value}" for name, value in preset.sampling.items()) or "-",
        "engine": ", ".join(f"{name} {value}" for name, value in preset.engine.items()) or "-",
        "vLLM cannot deliver": ", ".join(what for what, can in cannot.items() if not can) or "-",
    }
    return facts | {f"on {gpu}": describe(layout) for gpu, layout in preset.layouts.items()}


def _numbers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _short(preset: Preset, gpu: str) -> str:
    layout = preset.layouts.get(gpu)
    if layout is None:
        return "-"
    return str(layout.devices) if layout.nodes == 1 else f"{layout.nodes}x{GPUS_PER_NODE}"


def _billions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:,.1f} B"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:,.1f} GiB"
