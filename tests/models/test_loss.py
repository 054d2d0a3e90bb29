"""The chunked loss against float64 autograd and torch's own, for any chunk size; unsupervised tokens have no effect."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.documents import IGNORED
from minipeft.models import loss as module
from minipeft.models.loss import count_targets, cross_entropy


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, 9, 8], a head [31, 8] and labels [2, 9], a third of them unsupervised."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(31, 8, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(0, 31, (2, 9), generator=draw)
    return hidden, weight, labels.masked_fill(torch.rand(2, 9, generator=draw) < 0.3, IGNORED)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The equation written out: hidden t predicts label t + 1."""
    logits = hidden[:, :-1] @ weight.T
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 31, 100, 2**24])
@pytest.mark.parametrize("trains_head", [False, True])
def test_value_and_gradients(chunk: int, trains_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    hidden, weight, labels = given()
    weight.requires_grad_(trains_head)
    loss = cross_entropy(hidden, weight, labels)
    (loss / 7).backward()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = plain(*exact, labels)
    (want / 7).backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.allclose(hidden.grad.double(), exact[0].grad, rtol=0, atol=1e-6)  # gradients are of the order of 1
    assert (weight.grad is not None) == trains_head
    if trains_head:
        assert torch.allclose(weight.grad.double(), exact[1].grad, rtol=0, atol=1e-6)
    assert torch.allclose(loss, plain(hidden, weight, labels), rtol=1e-6)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    hidden, weight, labels = given(torch.bfloat16)
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    want = plain(hidden.detach().double(), weight.detach().double(), labels)
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(want.item(), rel=2**-8)


def test_gradcheck() -> None:
    """Against finite differences in float64; the loss itself is float32, hence 1e-6."""
    hidden, weight, labels = given(torch.float64)
    step = 1e-3
    cross_entropy(hidden, weight, labels).backward()
    for tensor in (hidden, weight):
        for at in range(0, tensor.numel(), 11):
            moved = []
            for sign in (1, -1):
                other = tensor.detach().clone()
                other.view(-1)[at] += sign * step
                pair = (other, weight.detach()) if tensor is hidden else (hidden.detach(), other)
                moved.append(plain(*pair, labels).item())
            assert tensor.grad.view(-1)[at].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-4)


def test_what_is_no_target_has_no_say() -> None:
    hidden, weight, labels = given()
    labels[:, 0] = 5  # comes first: predicted from nothing
    silent = labels[:, 1:] == IGNORED
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert count_targets(labels) == int((~silent).sum())
    assert not hidden.grad[:, :-1][silent].any()
    assert not hidden.grad[:, -1].any()
    labels[:, 0] = 6
    assert cross_entropy(hidden, weight, labels).item() == loss.item()


def test_without_a_target_the_loss_is_zero() -> None:
    hidden, weight, labels = given()
    loss = cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of the pass makes more logits than a chunk holds, and all write to one buffer."""
    seen: list[int] = []
    buffers: set[int] = set()
    mm = torch.mm

    def watched(h: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.append(out.numel())
        buffers.add(out.data_ptr())
        return mm(h, w, out=out)

    monkeypatch.setattr(module, "CHUNK_LOGITS", 62)
    monkeypatch.setattr(module.torch, "mm", watched)
    hidden, weight, labels = given()
    cross_entropy(hidden, weight, labels)
    assert max(seen) <= 62
    assert len(buffers) == 1
    assert sum(seen) == 31 * count_targets(labels)


@pytest.mark.parametrize("chunk", [31, 2**24])
@pytest.mark.parametrize(("divisor", "cap"), [(2.5, None), (1.0, 1.5), (4.0, 0.5)])
def test_divisor_cap_and_bias_of_the_logits(
    divisor: float, cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granite divides its logits, Gemma 2 caps them, Phi's head has a bias: against float64 autograd."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    hidden, weight, labels = given()
    bias = torch.linspace(-1, 1, 31).requires_grad_()
    loss = cross_entropy(hidden, weight, labels, bias, divisor, cap)
    loss.backward()
    h, w, b = (t.detach().double().requires_grad_() for t in (hidden, weight, bias))
    logits = (h[:, :-1] @ w.T + b) / divisor
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    want = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for ours, exact in ((hidden, h), (weight, w), (bias, b)):
        assert torch.allclose(ours.grad.double(), exact.grad, rtol=0, atol=1e-5)


def test_finish_is_the_plain_equation() -> None:
    logits = torch.tensor([-3.0, 0.0, 5.0])
    assert torch.equal(module.finish(logits), logits)
    assert torch.equal(module.finish(logits, 2.0), logits / 2)
    torch.testing.assert_close(module.finish(logits, 2.0, 1.5), 1.5 * (logits / 2 / 1.5).tanh())


def test_a_second_backward_is_right_or_an_error() -> None:
    """With a frozen head it gives the same gradient; a trained head's is scaled in place, and torch refuses."""
    hidden, weight, labels = given()
    loss = cross_entropy(hidden, weight.detach(), labels) / 7
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    trained = weight.detach().requires_grad_()
    loss = cross_entropy(hidden, trained, labels) / 7
    torch.autograd.grad(loss, trained, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, trained)
