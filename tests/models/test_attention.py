"""Attention masks against a literal definition: documents, virtual tokens, padding, cache, activation checkpointing.

The virtual tokens here come from minimal modules in the model's slots: adapters have their own tests.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipeft.documents import PADDING, VIRTUAL, positions_in, visible
from minipeft.errors import InputError
from minipeft.models import attention, products
from minipeft.models import layout as layouts
from minipeft.models.layout import Layout, View, lay_out

P = 5


class SmallPrefix(nn.Module):
    """A prefix: P trained keys and values before the row's own."""

    def __init__(self, heads: int, width: int, generator: torch.Generator):
        super().__init__()
        self.k, self.v = (nn.Parameter(torch.randn(heads, P, width, generator=generator)) for _ in "kv")

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat([own.expand(len(x), -1, -1, -1), x], dim=2) for own, x in ((self.k, k), (self.v, v)))


class SmallPrompt(nn.Module):
    """A prompt: P trained rows before the row's own embeddings."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(P, width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.weight.expand(len(x), -1, -1), x], dim=1)


def fill(model: nn.Module, kind: str) -> nn.Module:
    """Put virtual tokens into the model's slots: none, prefix, prompt, or either under the window (windowed)."""
    generator = torch.Generator().manual_seed(2)
    if "prefix" in kind:
        for block in model.blocks:
            getattr(block, "attn" if hasattr(block, "attn") else "self_attn").prefix = SmallPrefix(
                model.config.kv_heads, model.config.head_width, generator
            )
    elif "prompt" in kind:
        model.prompt = SmallPrompt(model.config.width, generator)
    model.virtual_tokens = 0 if kind == "none" else P
    model.windowed = "windowed" in kind
    return model


KINDS = ["none", "prefix", "prompt"]
CASES = [(family, kind) for family in ("gpt2", "llama", "mistral") for kind in KINDS]
CASES += [("mistral", "prefix windowed"), ("mistral", "prompt windowed")]


@pytest.fixture(params=CASES, ids=" ".join)
def model(request, twins) -> nn.Module:
    family, kind = request.param
    return fill(twins(family)[0], kind)


PACKED = torch.tensor(
    [[0] * 9 + [1] * 1 + [2] * 14 + [PADDING] * 6, [PADDING] * 4 + [7] * 3 + [3] * 8 + [PADDING] * 2 + [0] * 13]
)  # [2, 30]


def dense(monkeypatch) -> None:
    """Make every forward use the dense mask."""
    monkeypatch.setattr(layouts, "find_runs", lambda *_: None)


def outcome(model: nn.Module, ids: Tensor, documents: Tensor | None, weigh: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of each parameter for a loss of random weights on them."""
    model.zero_grad()
    logits = model(ids, documents)
    (logits * weigh).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def weights(documents: Tensor) -> Tensor:
    """Random weights for logits [B, T, V]; 0 at padding, where logits have no meaning."""
    weigh = torch.randn(*documents.shape, 61, generator=torch.Generator().manual_seed(3))
    return weigh * (documents != PADDING)[:, :, None]


def same(found: tuple, wanted: tuple, where: Tensor, tolerance: float = 1e-5) -> None:
    """Logits at `where`, and all gradients, agree relative to their largest."""
    assert (found[0] - wanted[0])[where].abs().max() <= tolerance * wanted[0].abs().max()
    for name, g in wanted[1].items():
        assert g.abs().max() > 0, name
        assert (found[1][name] - g).abs().max() <= tolerance * g.abs().max(), name


class TestPackedRows:
    def test_by_run_is_the_dense_mask(self, model, ids, monkeypatch):
        weigh, real = weights(PACKED), PACKED != PADDING
        layout = lay_out(PACKED, ids, None, virtual_tokens=model.virtual_tokens, prompted=model.prompt is not None)
        assert layout.views[None].runs is not None, "the control: these rows are computed by run"
        by_run = outcome(model, ids, PACKED, weigh)
        dense(monkeypatch)
        same(by_run, outcome(model, ids, PACKED, weigh), real)

    def test_packed_is_separate(self, model, ids):
        """Each document in its own row gives the same logits, and the sum of the rows' gradients."""
        weigh = weights(PACKED)
        packed = outcome(model, ids, PACKED, weigh)
        model.zero_grad()
        logits = torch.zeros_like(packed[0])
        for b in range(2):
            for owner in set(PACKED[b].tolist()) - {PADDING}:
                at = PACKED[b] == owner
                alone = model(ids[b : b + 1, at])  # [1, n, V]
                (alone[0] * weigh[b, at]).sum().backward()
                logits[b, at] = alone[0].detach()
        same(packed, (logits, {name: p.grad for name, p in model.named_parameters()}), PACKED != PADDING, 2e-5)

    def test_a_number_used_twice_is_one_document(self, model, ids, monkeypatch):
        """The rule compares ids: the second run of document 0 sees the first, by run or by mask."""
        documents = torch.tensor([[0] * 10 + [1] * 10 + [0] * 10] * 2)
        found = model(ids, documents)
        dense(monkeypatch)
        assert torch.allclose(found, model(ids, documents), atol=1e-4)

    def test_virtual_tokens_of_the_caller_are_everybodys(self, model, ids, monkeypatch):
        """Text that is run as VIRTUAL (the text init of a prefix) is seen by every document, by run or by mask."""
        documents = torch.tensor([[VIRTUAL] * 4 + [0] * 10 + [1] * 16] * 2)
        found = model(ids, documents)
        dense(monkeypatch)
        assert torch.allclose(found, model(ids, documents), atol=1e-4)

    def test_documents_do_not_see_each_other(self, model, ids):
        """Negative control: without `documents`, the logits of later documents change."""
        apart = (model(ids, PACKED) - model(ids)).abs().amax(dim=-1)  # [B, T]
        assert apart[0, :9].max() < 1e-4
        assert apart[0, 10:24].min() > 1e-2


class TestPadding:
    LEFT = torch.tensor([[PADDING] * 17 + [0] * 13, [0] * 30])

    def test_left_padded_is_alone(self, model, ids):
        padded = model(ids, self.LEFT)
        alone = model(ids[:1, 17:])
        assert (padded[:1, 17:] - alone).abs().max() <= 2e-5 * alone.abs().max()

    def test_left_padded_is_alone_through_the_cache(self, model, ids):
        cache = model.new_cache(2, 30)
        with torch.no_grad():
            model(ids[:, :20], self.LEFT[:, :20], cache)
            found = model(ids[:, 20:], cache=cache)[:1]
            alone = model(ids[:1, 17:])[:, 3:]
        assert (found - alone).abs().max() <= 2e-5 * alone.abs().max()

    def test_ids_under_padding_change_nothing(self, model, ids):
        for documents in (self.LEFT, PACKED):
            pads = documents == PADDING
            others = torch.where(pads, (ids + 7) % 61, ids)
            assert torch.equal(model(ids, documents)[~pads], model(others, documents)[~pads])

    def test_a_row_of_nothing_but_padding_is_finite(self, model, ids):
        documents = torch.full_like(ids, PADDING)
        logits, gradients = outcome(model, ids, documents, torch.ones(2, 30, 61))
        assert logits.isfinite().all()
        assert all(g.isfinite().all() for g in gradients.values())


class TestCache:
    def test_cached_is_uncached(self, model, ids):
        """Prefill 7 and 5 tokens, then one at a time."""
        cache = model.new_cache(2, 30)
        with torch.no_grad():
            cuts = [0, 7, *range(12, 31)]
            found = torch.cat([model(ids[:, a:b], cache=cache) for a, b in pairwise(cuts)], dim=1)
            wanted = model(ids)
        assert cache.length == 30 + model.virtual_tokens == cache.documents.shape[1]
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()

    def test_cached_packed_row_is_uncached(self, model, ids):
        cache = model.new_cache(2, 30)
        with torch.no_grad():
            cuts = [0, 7, 12, 13, 14, 30]
            found = torch.cat([model(ids[:, a:b], PACKED[:, a:b], cache) for a, b in pairwise(cuts)], dim=1)
            wanted = model(ids, PACKED)
        real = PACKED != PADDING
        assert (found - wanted)[real].abs().max() <= 2e-5 * wanted.abs().max()


class TestActivationCheckpointing:
    @pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_recomputed_is_kept(self, family, kind, twins, ids):
        """Logits and gradients, bit for bit, with dropout drawn again alike."""
        drops = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}.get(family, ("attention_dropout",))
        model = fill(twins(family, **dict.fromkeys(drops, 0.2))[0], kind).train()
        weigh = weights(PACKED)
        runs: list[int] = []
        model.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
        torch.manual_seed(5)
        kept = outcome(model, ids, PACKED, weigh)
        assert len(runs) == 1
        model.activation_checkpointing = True
        torch.manual_seed(5)
        again = outcome(model, ids, PACKED, weigh)
        assert len(runs) == 3, "each block runs again in backward"
        same(again, kept, PACKED > -9, 0.0)
        torch.manual_seed(6)
        assert not torch.equal(outcome(model, ids, PACKED, weigh)[0], kept[0]), "the control: dropout was on"

    def test_evaluation_does_not_recompute(self, twins, ids):
        model = twins("llama")[0]
        model.activation_checkpointing = True
        assert "Checkpoint" not in str(model(ids).grad_fn)
        runs = []
        model.blocks[1].register_forward_hook(lambda *_: runs.append(1))
        model(ids).sum().backward()
        assert runs == [1]


def test_documents_of_another_shape_are_refused(twins, ids):
    with pytest.raises(InputError, match=r"documents: shape \[2, 29\], but ids have \[2, 30\]"):
        twins("gpt2")[0](ids, PACKED[:, 1:])


def test_gradient_checks_against_float64():
    """attend_by_run and the dense product in float64, where only rounding is left."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 30, 6, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 2, 33, 6, dtype=torch.float64, generator=generator) for _ in "kv")
    layout = lay_out(PACKED, PACKED, None, virtual_tokens=3, windows=(4,))
    assert layout.views[4].runs is not None
    documents = torch.nn.functional.pad(PACKED, (3, 0), value=VIRTUAL)
    mask = visible(documents, positions_in(documents), 30, 4, False)
    full = Layout(layout.positions, 33, {4: View(mask)}, 3, False, True)
    real = PACKED != PADDING
    assert torch.allclose(
        attention.attend(q, k, v, layout, window=4)[real], attention.attend(q, k, v, full, window=4)[real], atol=1e-12
    )


@pytest.mark.parametrize("masked", [True, False])
def test_grouped_heads_under_a_mask_are_copied_where_no_fused_kernel_takes_both(monkeypatch, masked):
    """On CUDA torch would form all scores; without a mask its kernels support grouped heads."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=random, requires_grad=True) for heads in (6, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    calls = []
    real = F.scaled_dot_product_attention

    def noted(q, k, v, **settings):
        calls.append((k.shape[1], settings["enable_gqa"]))
        return real(q, k, v, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    found = []
    for lacking in (False, True):
        monkeypatch.setattr(attention, "lacks_masked_groups", lambda q, lacking=lacking: lacking)
        y = attention.product(q, k, v, mask, not masked, 0.0, None)
        found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    assert calls == [(2, True), (6, False) if masked else (2, True)]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def capped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, cap: float) -> Tensor:
    """The definition, one query at a time, head h with key head h // (H / K), over visible keys only."""
    out = torch.empty_like(q)
    for b, h, t in np.ndindex(*q.shape[:3]):
        own = h // (q.shape[1] // k.shape[1])
        keys, values = k[b, own, seen[t]], v[b, own, seen[t]]
        weights = (cap * torch.tanh(keys @ q[b, h, t] * scale / cap)).exp()
        out[b, h, t] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_the_capped_product_is_its_definition(masked, scale):
    """With grouped heads, by a mask (of a window) or causal."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=random, dtype=torch.float64) for heads in (4, 2, 2))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen = seen.triu(-2) if masked else seen
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~seen, float("-inf")) if masked else None
    found = attention.product(q, k, v, mask, not masked, 0.0, scale, 0.7)
    wanted = capped(q, k, v, seen, 8**-0.5 if scale is None else scale, 0.7)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # its softmax is in float32


def test_the_capped_product_drops_weights():
    """Dropout takes whole weights and scales the rest; without it nothing is drawn."""
    q, k, v = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    everywhere = torch.zeros(4, 4)
    torch.manual_seed(0)
    found = attention.product(q, k, v, everywhere, False, 0.5, None, 1.0)
    assert {round(value, 4) for value in found.flatten().tolist()} <= {0.0, 0.5, 1.0, 1.5, 2.0}  # 0 to 4 of 1/4, twice
    assert found.unique().numel() > 1
    torch.testing.assert_close(attention.product(q, k, v, everywhere, False, 0.0, None, 1.0), v)


def test_linears_of_one_input_are_done_together_where_the_first_knows_how():
    class Fused(nn.Linear):
        def together(self, x, linears):
            return tuple(linear(x) + 1 for linear in linears)

    x, plain, fused = torch.randn(2, 3), nn.Linear(3, 4), Fused(3, 5)
    torch.testing.assert_close(attention.project(x, fused, plain), (fused(x) + 1, plain(x) + 1))
    torch.testing.assert_close(attention.project(x, plain, fused), (plain(x), fused(x)))
    torch.testing.assert_close(attention.project(x, plain), (plain(x),))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(6, 2, 97), (4, 4, 130), (3, 1, 768)])
def test_the_product_in_blocks_is_causal_attention(monkeypatch, heads, groups, tokens, scale):
    """Within fast_products, against float64: y and the three gradients; outside, and for other sizes, torch's."""
    monkeypatch.setattr(products, "is_exact", lambda: True)
    monkeypatch.setattr(products.Switch, "wanted", True)
    used = []
    apply = attention.BlockCausalProduct.apply
    monkeypatch.setattr(attention.BlockCausalProduct, "apply", lambda *given: (used.append(1), apply(*given))[1])
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(2, n, tokens, 16, generator=draw) for n in (heads, groups, groups, heads)]

    def compute(q, k, v, dy):
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        y = attention.product(q, k, v, None, True, 0.0, scale)
        return (y, *torch.autograd.grad(y, (q, k, v), dy))

    exact = compute(*(t.double() for t in given))
    plain = compute(*given)
    assert not used
    with products.fast_products():
        found, again = compute(*given), compute(*given)
        assert len(used) == 2
        attention.product(given[0], given[1], given[2], None, True, 0.1, scale)  # dropout
        attention.product(*(t[:, :, :96] for t in given[:3]), None, True, 0.0, scale)
        attention.product(*(t.bfloat16() for t in given[:3]), None, True, 0.0, scale)
        assert len(used) == 2
    for a, b, c, want in zip(found, again, plain, exact, strict=True):
        assert torch.equal(a, b)
        assert (a - want).abs().max() <= 3e-6 * want.abs().max()
        assert (a - want).norm() <= 2 * (c - want).norm() + 1e-7


@pytest.mark.parametrize("tokens", [3, 4, 9])
def test_the_gradients_of_the_product_in_blocks(monkeypatch, tokens):
    """Finite differences in float64, of whole and part blocks; the same when recomputed in backward."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 4, tokens, 3), (1, 2, tokens, 3), (1, 2, tokens, 3))
    given = [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes]
    compute = lambda *t: attention.BlockCausalProduct.apply(*t, 0.4)
    assert torch.autograd.gradcheck(compute, given)
    again = checkpoint(compute, *given, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sum(), given), torch.autograd.grad(compute(*given).sum(), given)):
        assert torch.equal(a, b)
