"""Catches fused logits whose loss or gradients are not those of the logits, or that hold more than a chunk of them.

Shapes: R rows, H hidden size, D draft vocabulary, V target vocabulary.
"""

import weakref

import pytest
import torch
from dense_losses import logits, sparse
from torch import Tensor

from distill_pipe.consume import (
    DraftVocabulary,
    FusedLogits,
    expected_length_loss,
    fused,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.errors import UsageError

LOSSES = {"kl": kl_loss, "reverse_kl": reverse_kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss,
          "lk_hybrid": lk_hybrid_loss}
R, H, V = 13, 8, 40


def parts(dtype: torch.dtype = torch.float32, vocab: int = V) -> list[Tensor]:
    """Draft states, lm_head and bias."""
    return [x.to(dtype).requires_grad_() for x in (logits(R, H, 1), logits(vocab, H, 2, 0.7), logits(1, vocab, 3)[0])]


def both(name: str, plain: list[Tensor], chunked: list[Tensor], chunk_rows: int, **options: object) -> None:
    """Run the loss on logits and on fused logits; the gradients are left in the leaves."""
    target = sparse(logits(R, V, 4))
    one = LOSSES[name](plain[0] @ plain[1].T + plain[2], target, **options)
    other = LOSSES[name](FusedLogits(*chunked, chunk_rows=chunk_rows), target, **options)
    torch.autograd.backward([one.loss, other.loss])
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    assert torch.allclose(other.alpha_R, one.alpha_R, atol=1e-5)
    assert torch.allclose(other.alpha_upper_R, one.alpha_upper_R, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 100])
@pytest.mark.parametrize("tail", ["sampled", "drop", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_logits(name: str, tail: str, chunk_rows: int) -> None:
    plain, chunked = parts(), parts()
    both(name, plain, chunked, chunk_rows, tail=tail, weights_R=torch.arange(R).float())
    for one, other in zip(plain, chunked, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_draft_vocabulary_and_a_temperature_go_through() -> None:
    vocabulary = DraftVocabulary.from_ids(torch.arange(1, V, 2), V)
    plain, chunked = parts(vocab=vocabulary.size), parts(vocab=vocabulary.size)
    both("lk_hybrid", plain, chunked, 4, vocabulary=vocabulary, temperature=0.6)
    for one, other in zip(plain, chunked, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", ["sampled", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradients_are_those_of_finite_differences(name: str, tail: str) -> None:
    leaves = parts(torch.float64)
    target = sparse(logits(R, V, 4))
    weights_R = torch.linspace(0, 2, R)

    def loss(*leaves: Tensor) -> Tensor:
        # The weight of the hybrid loss has no gradient of its own, so it is fixed for finite differences.
        options = {"kl_share": 0.3} if name == "lk_hybrid" else {}
        return LOSSES[name](FusedLogits(*leaves, chunk_rows=5), target, tail=tail, weights_R=weights_R, **options).loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_a_frozen_head_gets_no_gradient_and_no_product_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    states_RH, weight_DH, bias_D = parts()
    products: list[Tensor] = []
    monkeypatch.setattr(fused, "_add_product", lambda *tensors: products.append(tensors[0]))
    loss = kl_loss(FusedLogits(states_RH, weight_DH.detach(), bias_D.detach()), sparse(logits(R, V, 4))).loss
    loss.backward()
    assert states_RH.grad is not None
    assert products == []


def test_no_more_than_one_chunk_of_logits_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    states_RH, weight_DH, bias_D = parts()
    multiply, alive = fused._Head.logits, []

    def logits_of(head: fused._Head, states_CH: Tensor) -> Tensor:
        assert all(earlier() is None for earlier in alive)
        logits_CD = multiply(head, states_CH)
        alive.append(weakref.ref(logits_CD))
        return logits_CD

    monkeypatch.setattr(fused._Head, "logits", logits_of)
    lk_hybrid_loss(FusedLogits(states_RH, weight_DH, bias_D, chunk_rows=4), sparse(logits(R, V, 4))).loss.backward()
    assert len(alive) == 2 * 4


def test_only_the_head_may_be_trained() -> None:
    states_RH, weight_DH, _ = parts()
    kl_loss(FusedLogits(states_RH.detach(), weight_DH), sparse(logits(R, V, 4))).loss.backward()
    assert weight_DH.grad is not None


def test_a_tied_head_adds_up_both_uses() -> None:
    ids_R = torch.arange(R) % V
    grads = []
    for chunked in (False, True):
        table_VH = logits(V, H, 2, 0.7).requires_grad_()
        states_RH = torch.nn.functional.embedding(ids_R, table_VH).tanh()
        draft = FusedLogits(states_RH, table_VH, chunk_rows=4) if chunked else states_RH @ table_VH.T
        lk_hybrid_loss(draft, sparse(logits(R, V, 4))).loss.backward()
        grads.append(table_VH.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_bfloat16_parameters_give_the_loss_of_bfloat16_logits() -> None:
    plain, chunked = parts(torch.bfloat16), parts(torch.bfloat16)
    target = sparse(logits(R, V, 4))
    one = lk_hybrid_loss(torch.nn.functional.linear(*plain), target)
    other = lk_hybrid_loss(FusedLogits(*chunked, chunk_rows=4), target)
    torch.autograd.backward([one.loss, other.loss])
    assert other.loss.dtype == torch.float32
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-4)
    for a, b in zip(plain, chunked, strict=True):
        assert b.grad.dtype == torch.bfloat16
        assert torch.allclose(a.grad.float(), b.grad.float(), rtol=0.05, atol=0.02 * a.grad.float().abs().max().item())


def test_autocast_multiplies_in_its_type_forward_and_backward() -> None:
    plain, chunked = parts(), parts()
    target = sparse(logits(R, V, 4))
    with torch.autocast("cpu", torch.bfloat16):
        one = kl_loss(torch.nn.functional.linear(*plain), target)
        other = kl_loss(FusedLogits(*chunked, chunk_rows=4), target)
    torch.autograd.backward([one.loss, other.loss])
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    for a, b in zip(plain, chunked, strict=True):
        assert b.grad.dtype == torch.float32
        assert torch.allclose(a.grad, b.grad, rtol=0.05, atol=0.02 * a.grad.abs().max().item())


# The compiler itself looks at `.grad` of what it holds when it comes back.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_code_leaves_the_graph_for_the_loss_and_comes_back() -> None:
    states_RH, weight_DH, _ = parts()
    target = sparse(logits(R, V, 4))

    def step(states_RH: Tensor, weight_DH: Tensor) -> Tensor:
        return lk_hybrid_loss(FusedLogits(states_RH.tanh(), weight_DH, chunk_rows=4), target).loss * 2

    expected = torch.autograd.grad(step(states_RH, weight_DH), (states_RH, weight_DH))
    # `aot_eager` traces forward and backward as the default does and needs no C++ compiler.
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(states_RH, weight_DH), (states_RH, weight_DH))
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_several_positions_share_one_head() -> None:
    heads = []
    for chunked in (False, True):
        weight_DH = logits(V, H, 2, 0.7).requires_grad_()
        states = [logits(R, H, p) for p in range(3)]
        drafts = [FusedLogits(s_RH, weight_DH, chunk_rows=4) if chunked else s_RH @ weight_DH.T for s_RH in states]
        expected_length_loss(drafts, [sparse(logits(R, V, 20 + p)) for p in range(3)]).loss.backward()
        heads.append(weight_DH.grad)
    assert torch.allclose(*heads, rtol=1e-4, atol=1e-7)


def test_no_rows_give_zero_gradients() -> None:
    states_RH, weight_DH, _ = parts()
    empty_RH = states_RH.detach()[:0].requires_grad_()
    output = lk_hybrid_loss(FusedLogits(empty_RH, weight_DH), sparse(logits(0, V, 4)))
    output.loss.backward()
    assert output.loss.item() == 0
    assert (weight_DH.grad == 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    states_RH, weight_DH, _ = parts()
    with pytest.raises(UsageError, match="lm_head"):
        FusedLogits(states_RH, weight_DH[:, 1:])
    with pytest.raises(UsageError, match="chunk_rows"):
        FusedLogits(states_RH, weight_DH, chunk_rows=0)
    with pytest.raises(UsageError, match="vocabulary of 40"):
        kl_loss(FusedLogits(states_RH, weight_DH[1:]), sparse(logits(R, V, 4)))
