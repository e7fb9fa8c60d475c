"""SpecForge, EAGLE-3 offline (sgl-project/SpecForge 0.2, `runtime/data_plane/offline_reader.py` and
`algorithms/eagle3/data.py`).

    rows_0-2000/data_{i}.ckpt   torch.save: input_ids [S], loss_mask [S] int64,
                                hidden_state [1, S, H] behind the final norm, aux_hidden_state [1, S, 3H]
    vocab_mapping.pt            d2t and t2d of the draft's vocabulary, where one was asked for

The trainer multiplies `hidden_state` by lm_head, and shifts ids and target by one: index t pairs the auxiliary state of
t with token t+1, compares with the distribution at t+1, and weights by the mask at t. It zeroes the mask of the last
index itself. Its `vocab_mapping_path` takes `vocab_mapping.pt`; without one it counts tokens itself.
"""

from typing import ClassVar

from distill_pipe.consume.exporters.pickled import PickledLayout
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import paired_tokens


class SpecForge(PickledLayout):
    """Layout of SpecForge's EAGLE-3 feature files."""

    name: ClassVar[str] = "specforge"
    suffix: ClassVar[str] = "ckpt"
    aux_count: ClassVar[int | None] = 3
    takes_draft_vocab: ClassVar[bool] = True

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        return {"input_ids": token_ids_S, "loss_mask": loss_mask_S, "hidden_state": self.last_SH(record)[None],
                "aux_hidden_state": self.aux_SW(record)[None]}
