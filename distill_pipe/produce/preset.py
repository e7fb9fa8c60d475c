"""Presets: what `--target NAME` stands for, one YAML file per target.

A preset holds what config.json cannot: where the model is, on what it fits, and what its class in vLLM cannot do. Facts
of the config stand in it too, so that a plan needs no network, and are compared with the real ones at every start. The
trade-off: a preset that has gone stale is refused, not followed.

The folder that `DISTILL_PIPE_TARGETS` names goes over ours, for targets of one's own.
"""

import importlib.resources
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from distill_pipe.errors import UsageError
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.gpus import GPUS, GPUS_PER_NODE
from distill_pipe.produce.model_config import ModelConfig
from distill_pipe.store.spec import SamplingSpec

FOLDER_VARIABLE = "DISTILL_PIPE_TARGETS"
Plain = dict[str, object]


class Layout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one engine is spread over GPUs of a type: tensor and pipeline parallel sizes, and whether experts are kept
    whole and dealt out to the devices. Data parallelism is more engines."""

    tp: Annotated[int, Meta(ge=1)] = 1
    pp: Annotated[int, Meta(ge=1)] = 1
    ep: bool = False

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    @property
    def nodes(self) -> int:
        """Machines of eight GPUs that one engine takes."""
        return -(-self.devices // GPUS_PER_NODE)

    def engine(self) -> Plain:
        """The layout as options of the engine. Only Ray spreads one over machines."""
        backend: Plain = {"distributed_executor_backend": "ray"} if self.nodes > 1 else {}
        return {"tensor_parallel_size": self.tp, "pipeline_parallel_size": self.pp,
                "enable_expert_parallel": self.ep} | backend


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model's class in vLLM can deliver: hidden states at all, those of earlier pipeline stages, and the
    embeddings (layer 0)."""

    states: bool = True
    pipelined_states: bool = True
    embeddings: bool = True


class Preset(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of `targets/`. `layers` are the default (EAGLE-3's) and `mtp_layers` what a multi-token prediction head
    trains on, both as `--layers` takes them. `reasoning` is how the target marks its thoughts, `response_tokens` a
    guess at how much it says to a chat prompt, for plans. `sampling` and `engine` go under what the job says."""

    model: str
    revision: str | None = None
    licence: str | None = None
    access: str | None = None
    dtype: str = "auto"
    quantization: Literal["fp8", "mxfp4"] | None = None
    max_model_len: Annotated[int, Meta(ge=2)] | None = None
    layers: str = "3+last"
    mtp_layers: str = "last"
    chat_template: str | None = None
    reasoning: Literal["think", "harmony"] | None = None
    sampling: Plain = msgspec.field(default_factory=dict)
    response_tokens: Annotated[int, Meta(ge=1)] | None = None
    engine: Plain = msgspec.field(default_factory=dict)
    layouts: dict[str, Layout] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    config: ModelConfig | None = None


def preset_names() -> list[str]:
    """The targets known by name, ours and those of `DISTILL_PIPE_TARGETS`."""
    return sorted({name for name, _ in _files()})


def load_preset(name: str) -> Preset | None:
    """The preset called `name`, or None.

    Raises:
        UsageError: its file is not a preset.
    """
    text = dict(_files()).get(name)
    return None if text is None else _parse(text.read_text(encoding="utf-8"), str(text))


def _files() -> Iterator[tuple[str, "Path | importlib.resources.abc.Traversable"]]:
    """Names and files; of the same name twice, the last one counts."""
    own = os.environ.get(FOLDER_VARIABLE)
    if own and not Path(own).is_dir():
        raise UsageError(f"{FOLDER_VARIABLE}={own}: there is no such folder")
    for folder in (importlib.resources.files("distill_pipe") / "targets", *([Path(own)] if own else [])):
        yield from ((file.name.removesuffix(".yaml"), file) for file in folder.iterdir()
                    if file.name.endswith(".yaml"))


def _parse(text: str, where: str) -> Preset:
    try:
        preset = msgspec.convert(yaml.safe_load(text), Preset)
        for group, kind in ((preset.sampling, SamplingSpec), (preset.engine, EngineOptions)):
            msgspec.convert(group, kind)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise UsageError(f"target file {where} is not a preset: {' '.join(str(error).split())}") from None
    if unknown := set(preset.layouts) - set(GPUS):
        raise UsageError(f"target file {where}: layouts for {', '.join(sorted(unknown))}, known are {', '.join(GPUS)}")
    return preset
