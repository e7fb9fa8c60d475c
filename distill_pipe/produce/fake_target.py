"""A target without a model: its next-token distribution and its hidden states are hashes of the tokens so far.

Row by row the same in any batch and at any number of engines, so that two runs can be compared byte by byte. Logits are
made with additions and multiplications alone, which IEEE 754 leaves no choice about. Tokens are bytes after three
special ones, and the chat template is the one of `targets/fake`, where the rest of a model folder lies as well.
Nothing can be learnt from what such a target writes.

Shapes: T tokens, R rows, V vocabulary, L layers, H hidden size.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill_pipe.produce.chat import Renderer
from distill_pipe.store.plan import Message
from distill_pipe.store.spec import EngineSpec, SamplingSpec
from distill_pipe.store.splitmix import mix

ARCHITECTURE = "FakeForCausalLM"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
FIRST_BYTE = len(SPECIAL)
_PIECES = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
_SPREAD = np.float32(16.0)
_DRAW, _STATES = 1 << 40, 2 << 40


def fake_spec(max_model_len: int) -> EngineSpec:
    """The identity of the fake engine; its version counts changes of the hash."""
    return EngineSpec(name="fake", version="1", max_model_len=max_model_len)


class ByteRenderer(Renderer):
    """What `Renderer` makes of `targets/fake`, without the two seconds that importing transformers takes."""

    def __init__(self) -> None:
        self._special = set(range(FIRST_BYTE))

    def _text(self, messages: Sequence[Message], generate: bool) -> str:
        turns = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        return turns + "<|im_start|>assistant\n" * generate

    def _encode(self, text: str, first: bool) -> list[int]:  # noqa: ARG002 - as its base
        ids: list[int] = []
        for piece in _PIECES.split(text):
            ids += [SPECIAL.index(piece)] if piece in SPECIAL else [FIRST_BYTE + byte for byte in piece.encode()]
        return ids


def text_of(token_ids: Sequence[int]) -> str:
    """The bytes among the tokens, as text."""
    return bytes(token - FIRST_BYTE for token in token_ids if token >= FIRST_BYTE).decode(errors="replace")


def prefix_hashes(token_ids_T: Sequence[int], start: int = 0, before: int = 0) -> NDArray[np.uint64]:
    """One hash per position, of all tokens up to it. Where the first token is not the sequence's, `start` is its
    position and `before` the `prefix_sum` of what comes before it."""
    sums_T = np.cumsum(_terms(token_ids_T, start), dtype=np.uint64) + np.array([before], np.uint64)
    return mix(sums_T)


def prefix_sum(token_ids_T: Sequence[int], start: int = 0, before: int = 0) -> int:
    """What `prefix_hashes` needs to go on after these tokens."""
    return (int(_terms(token_ids_T, start).sum(dtype=np.uint64)) + before) % 2**64


def logits_of(hashes_R: NDArray[np.uint64], vocab_size: int) -> NDArray[np.float32]:
    """Raw logits after each prefix, `[R, V]`: a few tokens stand out and all of them are possible."""
    unit_RV = _unit(hashes_R, np.arange(vocab_size))
    return unit_RV * unit_RV * unit_RV * unit_RV * _SPREAD


def states_of(hashes_T: NDArray[np.uint64], layers: Sequence[int], hidden_size: int) -> NDArray[np.float32]:
    """Hidden states of each layer, `[L, T, H]`, between -2 and 2."""
    return np.stack([4 * _unit(hashes_T, np.arange(hidden_size) + _STATES + (n << 32)) - 2 for n in layers])


def draw(logits_V: NDArray[np.float32], prefix: np.uint64, ordinal: int, sampling: SamplingSpec) -> int:
    """The next token: sampled as `sampling` says, with a random number that is a hash of prefix, prompt and seed."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.astype(np.float64) / sampling.temperature
    order_V = np.argsort(-scaled_V, kind="stable")
    mass_V = np.cumsum(np.exp(scaled_V[order_V] - scaled_V[order_V[0]]))
    kept = int(np.searchsorted(mass_V, sampling.top_p * mass_V[-1])) + 1
    key = mix(np.array([(sampling.seed * 1_000_003 + ordinal) % 2**63], np.uint64)) ^ prefix
    point = float(_unit(key, np.array([_DRAW]))[0, 0]) * mass_V[min(kept, len(mass_V)) - 1]
    return int(order_V[np.searchsorted(mass_V, point, side="right")])


def _terms(token_ids_T: Sequence[int], start: int) -> NDArray[np.uint64]:
    positions_T = np.arange(start, start + len(token_ids_T))
    return mix((positions_T << 32 | np.asarray(token_ids_T, np.int64)).astype(np.uint64))


def _unit(hashes_R: NDArray[np.uint64], keys_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) for each pair, `[R, N]`: 24 bits, which float32 holds exactly."""
    bits_RN = mix(hashes_R[:, None] ^ mix(keys_N.astype(np.uint64)))
    return (bits_RN >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
