"""A view for each distinct window equals the view of a layout for that window alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minipeft.models.layout import View, lay_out
from minipeft.models.mistral import Mistral, MistralConfig

PACKED = torch.tensor([[0] * 9 + [1] + [2] * 14 + [-1] * 6, [0] * 12 + [1] * 18])
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}  # fmt: skip


def same(a: View, b: View) -> bool:
    """Whether two views hold the same mask or runs."""
    if a.runs is not None and b.runs is not None:
        pairs = [(x, y) for own, other in zip(a.runs, b.runs) for x, y in zip(own, other, strict=True)]
        return all(n == m and equal(one, two) for (n, one), (m, two) in pairs)
    return (a.runs is None) == (b.runs is None) and equal(a.mask, b.mask)


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.mark.parametrize("documents", [None, PACKED])
@pytest.mark.parametrize("virtual_tokens", [0, 3])
@pytest.mark.parametrize("windowed", [False, True])
def test_each_window_has_the_view_that_it_has_alone(documents, virtual_tokens, windowed):
    ids = torch.zeros(2, 30, dtype=torch.long)
    given = {"virtual_tokens": virtual_tokens, "windowed": windowed}
    both = lay_out(documents, ids, None, windows=(None, 4, 64), **given)
    assert list(both.views) == [None, 64, 4] if documents is None and not virtual_tokens else [None, 4, 64]
    for window in (None, 4, 64):
        alone = lay_out(documents, ids, None, windows=(window,), **given)
        assert same(both.views[window], alone.views[window])
        assert torch.equal(both.positions, alone.positions)
    assert not same(both.views[None], both.views[4]), "the control: the windows differ"


@dataclass(frozen=True)
class Alternating(MistralConfig):
    """A window on even layers only, as Gemma 2 has it."""

    def window(self, layer: int) -> int | None:
        return self.sliding_window if layer % 2 == 0 else None


def test_layers_with_and_without_a_window_stand_in_one_model(ids):
    """Packed equals separate, cached equals uncached, and both kinds of layer change the logits."""
    models = []
    for config in (Alternating(**SMALL, sliding_window=5), MistralConfig(**SMALL, sliding_window=5)):
        model = Mistral(config).eval().double()  # so that what is left is rounding
        model.initialize(torch.Generator().manual_seed(0))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(8)  # so that a wrong mask shows
        models.append(model)
    model, windowed = models
    assert model.windows == (5, None)
    with torch.no_grad():
        whole, packed = model(ids), model(ids, PACKED)
        assert torch.allclose(packed[1, :12], model(ids[1:, :12])[0], atol=1e-9)
        cache = model.new_cache(2, 30)
        parts = [model(ids[:, start:stop], cache=cache) for start, stop in ((0, 17), (17, 18), (18, 30))]
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-9)
        assert (windowed(ids) - whole).abs().max() > 0.01


def test_a_plain_layout_has_nothing_but_positions():
    layout = lay_out(None, torch.zeros(2, 7, dtype=torch.long), None)
    assert layout.positions.tolist() == [[*range(7)]] * 2
    assert (layout.columns, layout.virtual_tokens, layout.prompted, layout.first) == (7, 0, False, True)
    assert layout.views == {None: View()}


@pytest.mark.parametrize(("virtual_tokens", "prompted"), [(0, False), (3, False), (3, True)])
def test_rows_are_cut_where_any_holds_two_documents(virtual_tokens, prompted):
    """Runs cost the documents' squares; where no row has two, one product with a mask is as good."""
    ids, single = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    two = torch.tensor([[0] * 6, [0] * 3 + [1] * 3])
    given = {"virtual_tokens": virtual_tokens, "prompted": prompted}
    runs = lay_out(two, ids, None, **given).views[None].runs
    head = [virtual_tokens] if prompted else []
    assert [[n for n, _ in row] for row in runs] == [[*head, 6], [*head, 3, 3]]
    assert lay_out(single, ids, None, **given).views[None].runs is None


@pytest.mark.parametrize("row", [[0] * 9, [3] * 9])
def test_a_row_of_one_document_has_no_mask(row):
    """As every row of a text that is longer than a row: plain causal attention."""
    ids = torch.zeros(2, 9, dtype=torch.long)
    views = lay_out(torch.tensor([row, row]), ids, None, windows=(None, 4, 9)).views
    assert views[None] == views[9] == View()
    assert views[4].mask is not None
    padded = torch.tensor([[0] * 9, [0] * 8 + [-1]])
    assert lay_out(padded, ids, None).views[None].runs is not None
    assert lay_out(torch.tensor([row, row]), ids, None, virtual_tokens=2).views[None].mask is not None
