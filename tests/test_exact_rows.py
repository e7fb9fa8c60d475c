"""Catches stored states, norm and rows that do not belong together: a real target's rows come back from its states.

Shapes: R rows, H hidden size, V vocabulary.
"""

from pathlib import Path

import torch

from distill_pipe.consume import ExactTarget, ShardReader, final_norm, tv_loss
from distill_pipe.consume.drafts.target_files import read_weights
from distill_pipe.produce.smollm2 import materialise_smollm2


def test_the_last_states_of_a_real_target_give_its_stored_rows_and_an_alpha_within_their_bounds(scored: Path) -> None:
    batch = next(iter(ShardReader(scored, layers=(30,))))
    name = "model.embed_tokens.weight"
    tied_VH = read_weights(materialise_smollm2(), (name,))[name].float()
    target = ExactTarget(batch.hidden[30][batch.rows_R], tied_VH, final_norm(scored), chunk_rows=8)
    logits_RV = target.logits(slice(0, len(target)))
    logprobs_RV = logits_RV.log_softmax(1)
    assert torch.allclose(logprobs_RV.gather(1, batch.target.topk_ids_RK), batch.target.topk_logprobs_RK, atol=2e-3)
    assert torch.allclose(logprobs_RV.gather(1, batch.target.tail_ids_RM), batch.target.tail_logprobs_RM, atol=2e-3)
    noise_RV = torch.randn(logits_RV.shape, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.6):
        draft_RV = logits_RV + noise_RV
        exact = tv_loss(draft_RV, target, tail="exact", temperature=temperature)
        stored = tv_loss(draft_RV, batch.target, temperature=temperature)
        assert (stored.alpha_lower_R <= exact.alpha_R + 2e-3).all()
        assert (exact.alpha_R <= stored.alpha_upper_R + 2e-3).all()
        assert abs(stored.alpha.item() - exact.alpha.item()) < 0.05
