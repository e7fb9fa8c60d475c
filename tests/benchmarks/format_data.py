"""What the benchmarks of the on-disk format measure on: a real target's responses to real prompts, made once per
session by the real command line, with everything kept in float32. Also how they print.

The states before the final norm give the full logits of any row back, so that what is stored of a distribution can be
held against the distribution itself.

Shapes: T tokens, R rows, N positions, V vocabulary, H hidden size.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from runs import stored_traces, succeed, write_corpus
from safetensors import safe_open
from torch import Tensor

from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.store.manifest import Run, require_run
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.trace import Trace

LAYERS = (2, 15, 27, 30)
_LAST = LAYERS[-1]
_CHAT, _CODE = 110, 50
# Copies of so few rows over the vocabulary stay below what malloc maps anew, and faults in page by page, every time.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Captured:
    """The dataset's run and its traces, with all hidden states in float32."""

    root: LocalRoot
    run: Run
    traces: tuple[Trace, ...]

    def logits(self, traces: Sequence[Trace]) -> Tensor:
        """The target's logits at every supervised position of some traces, `[R, V]` in float32."""
        states_RH = torch.cat([torch.from_numpy(t.hidden[_LAST][t.positions_R]) for t in traces])
        with safe_open(materialise_smollm2() / "model.safetensors", "pt") as weights:
            tied_VH = weights.get_tensor("model.embed_tokens.weight").float()
        target = self.run.spec.target
        norm_H = torch.from_numpy(read_final_norm(self.root, target.hidden_size).copy())
        normed_RH = torch.nn.functional.rms_norm(states_RH, norm_H.shape, norm_H, target.final_norm_eps)
        logits_RV = torch.empty(len(normed_RH), len(tied_VH))
        for rows in chunks(len(normed_RH)):
            torch.mm(normed_RH[rows], tied_VH.T, out=logits_RV[rows])
        return logits_RV


def captured(factory: pytest.TempPathFactory) -> Captured:
    """The session's dataset; the first call makes it (about two minutes)."""
    return _make(factory.getbasetemp() / "format")


# The folder is the session's. A fixture imported by two files would run twice.
@lru_cache(maxsize=1)
def _make(folder: Path) -> Captured:
    folder.mkdir()
    source = demo()
    corpus = write_corpus(folder / "prompts.jsonl", [*islice(source.chat_prompts(), _CHAT),
                                                     *islice(source.code_prompts(), _CODE)])
    succeed("generate", "--target", "smollm2-135m", "--corpus", corpus, "--out", folder / "out",
            "--layers", ",".join(map(str, LAYERS)), "--hidden-codec", "f32", "--set", "capture.logprob_bits=24",
            "--set", "sampling.max_tokens=128")
    return opened(folder / "out")


def opened(path: Path) -> Captured:
    """A dataset that is there."""
    root = LocalRoot(path)
    return Captured(root, require_run(root), tuple(stored_traces(path)))


def chunks(rows: int) -> list[slice]:
    """Slices of rows that are few enough for temporary copies over the whole vocabulary."""
    return [slice(i, i + _ROWS_AT_ONCE) for i in range(0, rows, _ROWS_AT_ONCE)]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table below its title."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    print(f"\n{title}\n")
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def machine() -> str:
    """The processor's name, family and model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return ", ".join([facts.get("model name", "unknown processor"),
                      *(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)])


def demo() -> ModuleType:
    """The demo, for its prompts; it is a script and no part of the package."""
    path = Path(__file__).parents[2] / "jobs" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
