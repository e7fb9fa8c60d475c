"""What one engine step yields, on its way from the engine's thread to the sink's: arrays of the whole step, which the
sink's thread cuts up by prompt.

Hidden rows go through the codec where they are. On a GPU that is in the step, so that codes leave the device, which are
a third to half as many bytes, and no core of the host has to keep up with it. On a CPU the engine would wait for it, so
rows leave the step raw and the sink's thread codes them, the whole step at once. Either way the few rows whose error is
measured go along raw until their trace is whole: that costs no arithmetic in the step, and what is measured in the end
is what was really stored. The trade-off: a few percent more bytes leave the device.

Shapes: N rows of a step or of one prompt in it, m of them that are measured, R head rows, L layers, H hidden size, P
planes of W bytes of a coded row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.produce.assembly import CodedStates, StepRows
from distill_pipe.produce.offload import to_host
from distill_pipe.store.hidden_codec import as_tensor, code_rows, is_measured
from distill_pipe.store.spec import HiddenCodec


@dataclass(slots=True)
class Part:
    """What a step holds of one prompt: states of positions [first, stop), and head rows at `positions`."""

    ordinal: int
    first: int
    stop: int
    positions: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """The rows of a step, prompt after prompt, to be read once `ready` has returned. `head` follows
    `HeadRows.tensors()`, then the token that was sampled from each row. `states` are raw, `[L, N, H]`, or the three
    arrays of `CodedStates`; there are none when no layer is wanted."""

    parts: Sequence[Part]
    head: Sequence[NDArray[Any]]
    states: Sequence[NDArray[Any]]
    ready: Callable[[], object] | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.head, *self.states))


def codes_in_step(device: torch.device) -> bool:
    """Whether rows on this device are coded by the engine's thread: on a GPU it only starts that work."""
    return device.type != "cpu"


def captured_step(parts: Sequence[Part], head: Sequence[Tensor], hidden_LNH: Tensor | None, codec: HiddenCodec, *,
                  code: bool) -> CapturedStep:
    """Take fresh tensors of a step to the host, the states coded (`code`) or raw."""
    states: tuple[Tensor, ...] = ()
    if hidden_LNH is not None:
        states = _coded(hidden_LNH, parts, codec) if code else (hidden_LNH,)
    host, ready = to_host([*head, *states])
    return CapturedStep(parts, host[:len(head)], host[len(head):], ready)


def coded_step(step: CapturedStep, codec: HiddenCodec) -> CapturedStep:
    """The step with its states coded, if they are not."""
    if len(step.states) != 1:
        return step
    states, _ = to_host(_coded(as_tensor(step.states[0]), step.parts, codec))
    return CapturedStep(step.parts, step.head, states)


def by_prompt(step: CapturedStep) -> list[tuple[int, StepRows]]:
    """The rows of a coded step by ordinal, in memory of their own: a view would keep its whole step alive until the
    last prompt of it is finished, and a buffer of the device with it."""
    split, row, end, measured = [], 0, 0, 0
    bounds = np.searchsorted(_measured_rows(step.parts), np.cumsum([p.stop - p.first for p in step.parts])).tolist()
    for part, bound in zip(step.parts, bounds, strict=True):
        start, end, rows = end, end + part.stop - part.first, len(part.positions)
        states = None
        if step.states:
            codes_LNPW, scale_LN, exact_LmH = step.states
            states = CodedStates(codes_LNPW[:, start:end].copy(), scale_LN[:, start:end].copy(),
                                 exact_LmH[:, measured:bound].copy() if bound > measured else None)
        head = tuple([array[row:row + rows].copy() for array in step.head]) if rows else ()
        split.append((part.ordinal, StepRows(part.first, states, part.positions, head)))
        row, measured = row + rows, bound
    return split


def positions_of(parts: Sequence[Part]) -> NDArray[np.int64]:
    """The position of each row of a step's states."""
    first = np.array([p.first for p in parts])
    lengths = np.array([p.stop for p in parts]) - first
    positions_N: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(first + lengths - np.cumsum(lengths), lengths)
    return positions_N


def _measured_rows(parts: Sequence[Part]) -> NDArray[np.int64]:
    return np.flatnonzero(is_measured(positions_of(parts)))


def _coded(hidden_LNH: Tensor, parts: Sequence[Part], codec: HiddenCodec) -> tuple[Tensor, Tensor, Tensor]:
    """All layers at once: rows know nothing of each other."""
    layers, rows, _ = hidden_LNH.shape
    coded = code_rows(hidden_LNH.flatten(0, 1), codec)
    picked_m = torch.from_numpy(_measured_rows(parts)).to(hidden_LNH.device, non_blocking=True)
    codes_LNPW = coded.codes_NPW.view(layers, rows, *coded.codes_NPW.shape[1:])
    return codes_LNPW, coded.scale_N.view(layers, rows), hidden_LNH[:, picked_m]
