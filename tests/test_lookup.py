"""Catches wrong gradients of what is looked up in the draft's logits, and seams between the pieces of rows.

Shapes: R rows, X entries, D draft vocabulary.
"""

import pytest
import torch
from torch import Tensor

from distill_pipe.consume import lookup
from distill_pipe.consume.lookup import Query, look_up


def query_of(rows: int, vocab: int, *, outside: bool = False, temperature: float = 1.0) -> Query:
    generator = torch.Generator().manual_seed(rows)
    ids_RX = torch.stack([torch.randperm(vocab, generator=generator)[:4] for _ in range(rows)])
    held_RX = torch.rand(rows, 4, generator=generator) < 0.8
    held_RX[0] = False
    return Query(ids_RX, held_RX, torch.full((rows,), 0.1), temperature, outside)


def held(logq_RX: Tensor, query: Query) -> Tensor:
    """The answers that were asked for."""
    wanted_RX = query.held_RX
    if query.outside:
        wanted_RX = torch.cat([wanted_RX, torch.ones_like(wanted_RX[:, :1])], 1)
    return torch.where(wanted_RX, logq_RX, 0.0)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradient_is_that_of_finite_differences(outside: bool, temperature: float) -> None:
    query = query_of(5, 9, outside=outside, temperature=temperature)
    logits_RD = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z_RD: held(look_up(z_RD, query)[0], query), (logits_RD,))


@pytest.mark.parametrize("outside", [False, True])
def test_answers_are_those_of_a_log_softmax_however_rows_are_cut_to_pieces(
        outside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query = query_of(11, 30, outside=outside, temperature=0.7)
    logits_RD = 3 * torch.randn(11, 30, generator=torch.Generator().manual_seed(2))
    logq_RD = (logits_RD.double() / 0.7).log_softmax(1)
    in_query_RD = torch.zeros(11, 30, dtype=torch.bool)
    for r in range(11):
        in_query_RD[r, query.ids_RX[r][query.held_RX[r]]] = True
    expected_RX = logq_RD.gather(1, query.ids_RX)
    if outside:
        rest_R1 = logq_RD.masked_fill(in_query_RD, -torch.inf).logsumexp(1, keepdim=True)
        expected_RX = torch.cat([expected_RX, rest_R1], 1)
    weights_RX = torch.randn(expected_RX.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for piece_bytes in (1, 30 * 4 * 4, 1 << 20):
        monkeypatch.setattr(lookup, "_CPU_PIECE_BYTES", piece_bytes)
        leaf_RD = logits_RD.clone().requires_grad_()
        logq_RX, capped_R = look_up(leaf_RD, query)
        assert torch.allclose(held(logq_RX, query).double(), held(expected_RX, query), atol=1e-5)
        assert torch.allclose(capped_R.double(), logq_RD.exp().clamp(max=0.1).sum(1), atol=1e-5)
        (held(logq_RX, query) * weights_RX).sum().backward()
        found.append(leaf_RD.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bfloat16_logits_are_looked_up_in_float32_and_get_bfloat16_gradients() -> None:
    query = query_of(3, 20)
    logits_RD = torch.randn(3, 20, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
    logq_RX, capped_R = look_up(logits_RD, query)
    logq_RX.sum().backward()
    plain_RX, plain_R = look_up(logits_RD.detach().float(), query)
    assert (logq_RX.dtype, capped_R.dtype, logits_RD.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert torch.equal(logq_RX, plain_RX)
    assert torch.equal(capped_R, plain_R)
