"""A target that is fed some tokens at a time, gives logits and hidden states, and can take tokens back.

A causal language model of Hugging Face transformers with its own key-value cache, one sequence at a time.

Shapes: N tokens of a call, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill_pipe.errors import UsageError


class Target(Protocol):
    """What decoding needs of a target."""

    def reset(self) -> None:
        """Forget the sequence."""

    def extend(self, token_ids: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Feed tokens; logits `[N, V]` behind each of them, and hidden states `[N, H]` by canonical layer."""

    def take_back(self, tokens: int) -> None:
        """Forget the last so many tokens."""


class CachedTarget:
    """A transformers model and its cache.

    Args:
        model: a causal language model with `layers` and a final `norm` in its decoder.
        layers: canonical layers whose states are wanted.

    Raises:
        UsageError: the model is built in another way, or keeps a state from which no token can be taken back.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        from transformers import DynamicCache

        # Without the model's config every layer keeps all tokens: one with a sliding window would let go of those that
        # it needs again once later ones are taken back. What a layer sees is up to the model's masks.
        self._model, self._new_cache = model, DynamicCache
        if any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=model.config).layers):
            raise UsageError(f"{type(model).__name__} has layers of linear attention, from whose state no token can be "
                             "taken back; only targets of plain attention can be decoded with here")
        decoder = model.get_decoder()
        blocks, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        if blocks is None or norm is None or max(layers) > len(blocks):
            raise UsageError(f"{type(model).__name__} has no decoder with `layers` and a final `norm` that go up to "
                             f"layer {max(layers)}")
        # Canonical layer n is what block n is given, and what the final norm is given after the last block.
        self._readers: dict[int, nn.Module] = {n: norm if n == len(blocks) else blocks[n] for n in layers}
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self._cache = self._new_cache()

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Feed tokens; logits behind each of them, and hidden states by canonical layer, in float32."""
        hidden: dict[int, Tensor] = {}

        def keep(layer: int, _module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            hidden[layer] = (args[0] if args else named["hidden_states"])[0].float()

        with ExitStack() as stack:
            for layer, reader in self._readers.items():
                stack.enter_context(reader.register_forward_pre_hook(partial(keep, layer), with_kwargs=True))
            ids_1N = torch.tensor([list(token_ids)])
            output = self._model(input_ids=ids_1N, past_key_values=self._cache, use_cache=True)
        logits_NV: Tensor = output.logits[0].float()
        return logits_NV, hidden

    def take_back(self, tokens: int) -> None:
        """Forget the last so many tokens."""
        if tokens:
            self._cache.crop(-tokens)
