"""NeMo Automodel, EAGLE-3 cache (NVIDIA-NeMo/Automodel 0.7, `components/datasets/llm/eagle3_cache.py`,
`components/speculative/eagle/target.py`).

Per sample of length S = `seq_length`; index t is a draft step that reads the auxiliary state of t and token t+1:

    aux_hidden_states [S, 3H]    of position t                 input_ids [S] int64   token t+1
    attention_mask [S] int64     there is such a state         loss_mask [S] int64   token t+1 is supervised, and t+2
    target_probs_values [S, k], target_probs_indices [S, k] int32   the distribution of token t+2 over the draft's
                                 vocabulary: probabilities, and numbers in `selected_token_ids` of the manifest
    position_mask [S, 1] bool    `loss_mask`, where the likeliest token is in the draft's vocabulary

The cache is shifted: all but the states is that of the next position. `target_embeddings.safetensors` holds the
target's embedding as float32 `weight`.

What is lost: the k probabilities are renormalised over the head entries that are in the draft's vocabulary, and all
other mass is given to them. A loss on such a target has another optimum than p, and its acceptance rate is biased;
`distill_pipe.consume.losses` has neither problem.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from distill_pipe.consume.exporters.automodel_cache import (
    DTYPE_NAMES,
    MASK_NOTE,
    SAMPLES_PER_SHARD,
    cache_file,
    target_folder,
    target_tables,
    write_cache_file,
    write_manifest,
)
from distill_pipe.consume.exporters.draft_vocabulary import chosen_vocabulary
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, ExportOptions, Layout, aux_layers, head_entries
from distill_pipe.consume.exporters.record import Record, Sample, at_positions, padded
from distill_pipe.consume.sparse import PADDING
from distill_pipe.consume.tensor_file import save_tensors
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError
from distill_pipe.store.disk import whole_file
from distill_pipe.store.manifest import Run


class AutomodelEagle3(Layout):
    """Layout of the EAGLE-3 cache, with the head as its top-k factorisation."""

    name: ClassVar[str] = "automodel-eagle3"
    samples_per_file: ClassVar[int] = SAMPLES_PER_SHARD
    drops_tail: ClassVar[bool] = True
    takes_draft_vocab: ClassVar[bool] = True
    notes = (MASK_NOTE,)

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self.layers = aux_layers(root, run, options, self.name, 3)
        if 0 in self.layers:
            raise UsageError(f"{self.name} has no number for layer 0, the embeddings; leave it out with --layers")
        # A draft step needs a state of t and a row of t+1.
        self.max_tokens = options.seq_length + 1
        size, vocab_size = options.draft_vocab, run.spec.target.vocab_size
        self._vocabulary = (DraftVocabulary.from_ids(torch.arange(vocab_size), vocab_size) if size is None
                            else chosen_vocabulary(root, run, size))
        # As many as the whole vocabulary would mean the other layout, `target_probs`.
        self.top_k = min(head_entries(root, run, options), self._vocabulary.size - 1)

    @property
    def layer_ids(self) -> list[int]:
        return [n - 1 for n in self.layers]

    def sample(self, record: Record) -> Sample:
        length = self.options.seq_length
        values_Rk, indices_Rk, selected_R = self._draft_head(record)
        steps_R = record.positions_R - 1
        token_supervised_S = padded(record.loss_mask_T[1:], length)
        row_S = at_positions(torch.ones_like(steps_R, dtype=torch.bool), steps_R, length)
        loss_mask_S = token_supervised_S & row_S
        position_mask_S = loss_mask_S & at_positions(selected_R, steps_R, length)
        return {"input_ids": padded(record.token_ids_T[1:], length),
                "attention_mask": padded(torch.ones_like(record.token_ids_T[1:]), length),
                "loss_mask": loss_mask_S.long(), "position_mask": position_mask_S[:, None],
                "aux_hidden_states": padded(record.states_SLH(self.layers, self.dtype).flatten(1), length),
                "target_probs_values": at_positions(values_Rk.to(self.dtype), steps_R, length),
                "target_probs_indices": at_positions(indices_Rk.int(), steps_R, length)}

    def item(self, sample: Sample) -> Sample:
        values_Sk, indices_Sk = sample["target_probs_values"], sample["target_probs_indices"].long()
        full_SD = values_Sk.new_zeros(len(values_Sk), self._vocabulary.size).scatter_(1, indices_Sk, values_Sk)
        kept = {name: tensor for name, tensor in sample.items() if not name.startswith("target_probs_")}
        return kept | {"target_probs": full_SD}

    def _draft_head(self, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Per row the k largest probabilities over the draft's vocabulary, their numbers, and whether the likeliest
        token is in it. A row with fewer repeats its first, which changes nothing when it is scattered."""
        ids_RK, logprobs_RK = record.target.topk_ids_RK, record.target.topk_logprobs_RK
        draft_RK = torch.where(ids_RK == PADDING, PADDING, self._vocabulary.t2d_V[ids_RK.clamp(min=0)])
        masked_RK = torch.where(draft_RK == PADDING, -torch.inf, logprobs_RK)
        kept_Rk, order_Rk = masked_RK.topk(min(self.top_k, masked_RK.shape[1]), dim=1)
        held_Rk = kept_Rk > -torch.inf
        mass_R1 = torch.where(held_Rk, kept_Rk.exp(), 0.0).sum(1, keepdim=True)
        values_Rk = torch.where(held_Rk, kept_Rk.exp() / mass_R1.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        indices_Rk = draft_RK.gather(1, order_Rk)
        values_Rk = torch.where(held_Rk, values_Rk, values_Rk[:, :1])
        indices_Rk = torch.where(held_Rk, indices_Rk, indices_Rk[:, :1]).clamp(min=0)
        width = self.top_k - values_Rk.shape[1]
        return (torch.cat([values_Rk, values_Rk[:, :1].expand(-1, width)], 1),
                torch.cat([indices_Rk, indices_Rk[:, :1].expand(-1, width)], 1), draft_RK[:, 0] != PADDING)

    def file_name(self, first: int) -> str:
        return cache_file(first)

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        write_cache_file(path, samples)

    def require_inputs(self) -> None:
        target_folder(self.options.target, self.name)

    def finish(self, folder: Path, inventory: Inventory) -> None:
        target = self.run.spec.target
        embedding_VH, _ = target_tables(target_folder(self.options.target, self.name))
        with whole_file(folder / "target_embeddings.safetensors") as path:
            save_tensors(path, {"weight": embedding_VH.float()})
        write_manifest(folder, 2, {
            "target_model": target.name, "target_vocab_size": target.vocab_size,
            "draft_vocab_size": self._vocabulary.size, "seq_length": self.options.seq_length,
            "dtype": DTYPE_NAMES[self.options.dtype], "num_samples": len(inventory), "target_probs_topk": self.top_k,
            "aux_hidden_dim": target.hidden_size * len(self.layers), "aux_layer_ids": self.layer_ids,
            "selected_token_ids": self._vocabulary.d2t_D.tolist(),
            "input_data": f"distill-pipe:{self.run.fingerprint}"})
