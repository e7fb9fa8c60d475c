"""A target that drafts can learn in a second: a bigram table. The distribution of token s+1 is `table()[x_s]`.

So a draft that reads x_{t+1+k} at step k can know the row it is compared with. The state stored for the last layer is
the row of the table itself, with which `exact` is exact; other layers hold noise.

Shapes: T tokens, V vocabulary, H hidden size (V = H = 32).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_datasets import Shape, commit_traces, start_run, trace_from_logits
from torch import Tensor

from distill_pipe.consume import Batch, ShardReader
from distill_pipe.consume.drafts.draft import Chain, Draft
from distill_pipe.consume.drafts.target_files import read_config
from distill_pipe.store.spec import SamplingSpec

SHAPE = Shape(vocab_size=32, hidden_size=32, num_layers=4, layers=(1, 2, 4), hidden_codec="f32", top_k=8,
              prompts_per_shard=20)
CONFIG = {"hidden_size": 32, "vocab_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
          "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1000.0}}


def table() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (32, 32)).astype(np.float32)


def write_bigrams(path: Path, traces: int = 60, shape: Shape = SHAPE, tokens: tuple[int, int] = (10, 30)) -> Path:
    """A dataset of texts sampled from the table at T = 1, with domains by turns, two traces each."""
    run, random = start_run(path, traces, shape, SamplingSpec()), np.random.default_rng(1)
    made = []
    for ordinal in range(traces):
        tokens_T = sample_text(random, int(random.integers(*tokens)))
        mask_T = np.arange(len(tokens_T)) >= ordinal % 3 + 1
        hidden = {n: random.normal(0, n, (len(tokens_T) - 1, 32)).astype(np.float32) for n in shape.layers}
        hidden[4] = table()[tokens_T[:-1]]
        made.append(trace_from_logits(ordinal, tokens_T, mask_T, table()[tokens_T], hidden, shape,
                                      domain=("general", "code")[ordinal // 2 % 2]))
    commit_traces(path, run, made)
    return path


def sample_text(random: np.random.Generator, tokens: int) -> np.ndarray:
    """A text as the target writes it at T = 1."""
    p_VV = torch.from_numpy(table()).double().softmax(1).numpy()
    text = [int(random.integers(32))]
    while len(text) < tokens:
        text.append(int(random.choice(32, p=p_VV[text[-1]])))
    return np.array(text, np.int32)


def write_target(folder: Path, extra: dict[str, Tensor] | None = None) -> Path:
    """What a draft takes from a target: sizes, an embedding of one-hot vectors, and a norm."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    weights = {"model.embed_tokens.weight": torch.eye(32), "model.norm.weight": torch.full((32,), 2.0)}
    save_file(weights | (extra or {}), folder / "model.safetensors")
    return folder


def one_batch(root: Path, batch_tokens: int = 100) -> Batch:
    return next(iter(ShardReader(root, layers=SHAPE.layers, batch_tokens=batch_tokens)))


class TableDraft(Draft):
    """Knows the table, or another one, and reads from the row of the token `late` places before: 0 makes it the target.
    """

    arch, recurrent = "eagle3", True

    def __init__(self, target: Path, late: int = 0, known_VV: np.ndarray | None = None) -> None:
        super().__init__(read_config(target), SHAPE.layers)
        self.late, self.known_VV = late, table() if known_VV is None else known_VV

    def begin(self, hidden: Mapping[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Chain:
        return _TableChain(self.late, torch.from_numpy(self.known_VV))

    def logits(self, states_RH: Tensor, position: int) -> Tensor:
        return states_RH


class _TableChain:
    def __init__(self, late: int, known_VV: Tensor) -> None:
        self._late, self._known_VV = late, known_VV

    def step(self, next_ids_A: Tensor) -> Tensor:
        return self._known_VV[next_ids_A.roll(self._late)]

    def narrow(self, anchors_A: Tensor) -> None:
        """Nothing is remembered."""


class TableTarget:
    """The bigram target fed some tokens at a time, with hidden states like those of the dataset."""

    def __init__(self, temperature_of_logits: float = 1.0) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._logits_VV = torch.from_numpy(table()) / temperature_of_logits

    def reset(self) -> None:
        """Nothing is remembered but the last token, which comes again."""

    def extend(self, token_ids: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        rows_NV = self._logits_VV[torch.tensor(list(token_ids))]
        noise = {n: n * torch.randn(rows_NV.shape, generator=self._random) for n in SHAPE.layers}
        return rows_NV, noise | {4: rows_NV}

    def take_back(self, tokens: int) -> None:
        """Nothing is remembered."""
