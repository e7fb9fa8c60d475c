"""A causal language model of Hugging Face transformers, asked for what a trace stores.

The states of a trace are computed in one pass and its logits in chunks, so the memory for logits does not grow with the
trace. The trade-off: each chunk runs the model on one token more, and in return whatever a class does to its logits is
done as it does it.

Shapes: T tokens, R rows, C rows of one chunk, N flat entries, V vocabulary, H hidden size.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_pipe.errors import UsageError
from distill_pipe.produce.targets import Target
from distill_pipe.store.trace import Trace

Dtype = Literal["float32", "bfloat16"]
Doubles = NDArray[np.float64]
CHUNK_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the model says where a trace stores something; fields as in `Trace`. `top1_gap_R`: how far the stored first
    entry lies below the model's likeliest token, in nats."""

    logsumexp_R: Doubles
    tail_mass_R: Doubles
    next_logprob_R: Doubles
    topk_logprobs_N: Doubles
    tail_logprobs_N: Doubles
    top1_gap_R: Doubles


def load_model(target: Target, dtype: Dtype) -> nn.Module:
    """The target in transformers; on the GPU where it fits there.

    Raises:
        UsageError: it cannot be loaded, or the checkpoint lacks some of its weights.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model, loaded = AutoModelForCausalLM.from_pretrained(
            target.model, revision=target.revision, dtype=getattr(torch, dtype), trust_remote_code=False,
            output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"transformers cannot load {target.model}: {reason}") from None
    if loaded["missing_keys"]:
        raise UsageError(f"{target.model} lacks weights of {type(model).__name__}: {sorted(loaded['missing_keys'])[0]}")
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.25 * model.get_memory_footprint():
        model.to("cuda")
    evaluated: nn.Module = model.eval()
    return evaluated


class Replayer:
    """A causal language model of transformers, asked for what a trace stores.

    Raises:
        UsageError: the model class does not keep its blocks and its final norm where canonical layers are looked for.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], num_layers: int) -> None:
        self._model, self._decoder = model, model.get_decoder()
        self.device: torch.device = model.device
        blocks: Any = getattr(self._decoder, "layers", None)
        norm: Any = getattr(self._decoder, "norm", None)
        if layers and (norm is None or blocks is None or len(blocks) != num_layers):
            raise UsageError(f"{type(model).__name__} has no decoder with {num_layers} `layers` and a final `norm`, so "
                             "its hidden states cannot be audited")
        # Canonical layer n is what block n is given, and what the final norm is given after the last block.
        self._readers = {n: norm if n == num_layers else blocks[n] for n in layers}

    @torch.inference_mode()
    def states(self, trace: Trace) -> tuple[Tensor, dict[int, Tensor]]:
        """The final states of all rows behind the norm, `[R, H]`, and by layer those of all positions but the last."""
        states: dict[int, Tensor] = {}

        def keep(layer: int, _module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            states[layer] = (args[0] if args else named["hidden_states"])[0, :-1].float().cpu()

        with ExitStack() as stack:
            for layer, reader in self._readers.items():
                stack.enter_context(reader.register_forward_pre_hook(partial(keep, layer), with_kwargs=True))
            tokens_1T = torch.from_numpy(trace.token_ids_T.astype(np.int64))[None].to(self.device)
            final_TH = self._decoder(input_ids=tokens_1T, use_cache=False).last_hidden_state[0]
        return final_TH[torch.from_numpy(trace.positions_R).to(self.device)], states

    @torch.inference_mode()
    def logits(self, final_CH: Tensor) -> Tensor:
        """Logits of final states. The whole model is run, on one token whose final state is exchanged for these: what
        a class does to its logits after the head (scaling, soft caps) is then done here too."""

        def exchange(_module: nn.Module, _args: object, output: Any) -> Any:
            output.last_hidden_state = final_CH[None]
            return output

        with self._decoder.register_forward_hook(exchange):
            token_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            logits_CV: Tensor = self._model(input_ids=token_11, use_cache=False).logits[0]
        return logits_CV

    def rows(self, trace: Trace, final_RH: Tensor, vocab_size: int) -> Replayed:
        """What the model says at each row, computed chunk by chunk."""
        size = max(1, CHUNK_BYTES // (4 * vocab_size))
        chunks = [replayed_rows(self.logits(final_RH[start:start + size]), trace, start)
                  for start in range(0, trace.num_rows, size)]
        return Replayed(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in Replayed.__slots__))


@torch.inference_mode()
def replayed_rows(logits_CV: Tensor, trace: Trace, first: int) -> Replayed:
    """What logits say of the trace's rows from `first` on, one of them per row."""
    stop = first + len(logits_CV)
    logprobs_CV = logits_CV.float()
    logsumexp_C1 = logprobs_CV.logsumexp(1, keepdim=True)
    logprobs_CV = logprobs_CV - logsumexp_C1

    def gather(counts_R: NDArray[np.int32], ids_N: NDArray[np.int32]) -> Doubles:
        before, end = int(counts_R[:first].sum()), int(counts_R[:stop].sum())
        rows_N, tokens_N = np.repeat(np.arange(len(logits_CV)), counts_R[first:stop]), ids_N[before:end]
        at = [torch.from_numpy(a.astype(np.int64)).to(logprobs_CV.device) for a in (rows_N, tokens_N)]
        found_N: Doubles = logprobs_CV[at[0], at[1]].double().cpu().numpy()
        return found_N

    topk_N, counts_C = gather(trace.topk_counts_R, trace.topk_ids_N), trace.topk_counts_R[first:stop]
    ones_R = np.ones(trace.num_rows, np.int32)
    return Replayed(
        logsumexp_R=logsumexp_C1[:, 0].double().cpu().numpy(), tail_mass_R=1 - row_sums(np.exp(topk_N), counts_C),
        next_logprob_R=gather(ones_R, trace.token_ids_T[trace.positions_R + 1]), topk_logprobs_N=topk_N,
        tail_logprobs_N=gather(trace.tail_counts_R, trace.tail_ids_N),
        top1_gap_R=logprobs_CV.amax(1).double().cpu().numpy() - topk_N[np.cumsum(counts_C) - counts_C])


def row_sums(values_N: Doubles, counts_R: NDArray[np.int32]) -> Doubles:
    """Sums over the entries of each row."""
    sums_R: Doubles = np.bincount(np.repeat(np.arange(len(counts_R)), counts_R), values_N,
                                  len(counts_R)).astype(np.float64)
    return sums_R
