"""A draft on disk: `model.safetensors` and `config.json` in the layout an engine loads, and `draft.json` for us.

| kind             | layout                                      | vLLM 0.32                                        |
|------------------|---------------------------------------------|--------------------------------------------------|
| `eagle3`         | `LlamaForCausalLMEagle3`, with `d2t`, `t2d` | loads, with a truncated vocabulary too           |
| `medusa`         | `MedusaModel`, with `token_map`             | loads with the whole vocabulary                  |
| `mtp`            | `MiMoForCausalLM`, `model.mtp_layers.0`     | loads with the whole vocabulary                  |
| `mlp_speculator` | `MLPSpeculatorPreTrainedModel`              | has the class, and does not register it          |

`d2t` follows the released EAGLE-3 drafts: what has to be added to a draft id to get the target's. Tables that were not
trained are written as bfloat16 where that loses nothing. An EAGLE-3 draft leaves out the embedding, which engines take
from the target; loading it here takes the target's folder as well.
"""

import tempfile
from pathlib import Path
from typing import Literal, get_args

import msgspec
import torch
from torch import Tensor

from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.consume.drafts.eagle3 import Eagle3Draft
from distill_pipe.consume.drafts.medusa import MedusaDraft
from distill_pipe.consume.drafts.mlp_speculator import MlpSpeculatorDraft
from distill_pipe.consume.drafts.mtp import MtpDraft
from distill_pipe.consume.drafts.target_files import DraftConfig
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import DamageError, UsageError
from distill_pipe.store.disk import storage_failures

Arch = Literal["eagle3", "medusa", "mlp_speculator", "mtp"]
DRAFTS: dict[Arch, type[Draft]] = {"eagle3": Eagle3Draft, "medusa": MedusaDraft, "mlp_speculator": MlpSpeculatorDraft,
                                   "mtp": MtpDraft}
WEIGHTS, CONFIG, RECORD = "model.safetensors", "config.json", "draft.json"
_TABLES = ("d2t", "t2d", "token_map")


class DraftRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is needed to build the draft again, and to measure it on traces it has not seen."""

    arch: Arch
    layers: tuple[int, ...]
    positions: int
    config: DraftConfig
    target: str
    holdout_every: int


def save_draft(draft: Draft, folder: Path, *, target: str, holdout_every: int) -> None:
    """Write a draft. `target` names the target it belongs to; every `holdout_every`-th trace was not trained on."""
    from distill_pipe.consume.tensor_file import save_tensors

    trained = {name for name, weight in draft.named_parameters() if weight.requires_grad}
    # Cloned: a table that several names share would be refused.
    weights = {name: _compact(weight.detach().cpu().clone(), name in trained)
               for name, weight in draft.state_dict().items() if name not in draft.unsaved}
    config = draft.engine_config() | {"dtype": "float32"}
    record = DraftRecord(arch=_arch(draft), layers=draft.layers, positions=draft.positions, config=draft.config,
                         target=target, holdout_every=holdout_every)
    with storage_failures(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / WEIGHTS, weights | _vocabulary_tables(draft), {"format": "pt"})
        (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record)))


def claim_folder(folder: Path) -> None:
    """See that a draft can be saved there, before hours go into it, and that nothing else is written over.

    Raises:
        UsageError: it cannot be written, or holds a model that is no draft of ours.
    """
    if not (folder / RECORD).exists() and (taken := [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]):
        raise UsageError(f"{folder} holds {' and '.join(taken)} of another model; give another folder (--out)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; give another folder (--out)") from error


def read_record(folder: Path) -> DraftRecord:
    """What `draft.json` says.

    Raises:
        UsageError: there is none, or it is of another version.
    """
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=DraftRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{folder} is not a draft that `distill-pipe train` wrote: {error}") from error


def load_draft(folder: Path, target_folder: Path) -> Draft:
    """A saved draft, ready to be run; what is the target's own comes from the target's folder.

    Raises:
        UsageError: one of the folders does not hold what it should.
        DamageError: the weights are not those of the draft that `draft.json` describes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = read_record(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    vocabulary = None
    if "d2t" in weights:
        ids_D = weights["d2t"] + torch.arange(len(weights["d2t"]))
        vocabulary = DraftVocabulary.from_ids(ids_D, record.config.vocab_size)
    draft = new_draft(record.arch, record.config, record.layers, record.positions, vocabulary, target_folder)
    kept = {name: weight for name, weight in weights.items() if name not in _TABLES}
    try:
        absent = set(draft.load_state_dict(kept, strict=False).missing_keys) - set(draft.unsaved)
    except RuntimeError as error:
        raise DamageError(f"{folder / WEIGHTS} does not fit draft.json: {error}") from error
    if absent or set(kept) - set(draft.state_dict()):
        raise DamageError(f"{folder / WEIGHTS} does not fit draft.json: {sorted(absent) or 'it holds more'}")
    return draft.eval()


def new_draft(arch: Arch, config: DraftConfig, layers: tuple[int, ...], positions: int,
              vocabulary: DraftVocabulary | None, target_folder: Path) -> Draft:
    """A draft that has taken over what it can from the target; the rest is drawn from torch's random numbers."""
    draft = DRAFTS[arch](config, layers, positions, vocabulary)
    draft.start_from_target(target_folder)
    return draft


def _arch(draft: Draft) -> Arch:
    return next(arch for arch in get_args(Arch) if arch == draft.arch)


def _compact(weight: Tensor, trained: bool) -> Tensor:
    half = weight.bfloat16()
    return half if not trained and weight.is_floating_point() and torch.equal(half.to(weight.dtype), weight) else weight


def _vocabulary_tables(draft: Draft) -> dict[str, Tensor]:
    if draft.vocabulary is None:
        return {}
    d2t_D = draft.vocabulary.d2t_D.cpu()
    tables = {"d2t": d2t_D - torch.arange(len(d2t_D)), "t2d": draft.vocabulary.t2d_V.cpu() >= 0}
    return tables | ({"token_map": d2t_D.clone()} if draft.arch == "medusa" else {})
