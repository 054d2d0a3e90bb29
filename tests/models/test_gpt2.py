"""GPT-2 against transformers' on the same weights; dropout; the position table."""

import pytest
import torch
import transformers

from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model
from minipeft.models.gpt2 import FAMILY, GPT2, GPT2Config

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one head": {"n_head": 1},
    "eight heads": {"n_head": 8},
    "odd sizes": {"vocab_size": 67, "n_embd": 30, "n_head": 3, "n_inner": 53, "n_positions": 37, "n_layer": 2},
    "narrow MLP": {"n_inner": 17},
    "one layer": {"n_layer": 1},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "unscaled, by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "wide epsilon": {"layer_norm_epsilon": 0.1},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, twins, apart, ids):
    ours, theirs = twins("gpt2", **SHAPES[shape])
    assert apart(ours, theirs, ids) <= 2e-5


def test_every_field_of_a_shape_matters(twins, apart, ids):
    """Negative control: each field of SHAPES that is not a size changes the logits."""
    plain, _ = twins("gpt2")
    for shape in ("scaled by layer", "unscaled", "wide epsilon", "gelu", "relu", "silu"):
        least = 1e-4 if shape == "gelu" else 1e-2  # gelu and its tanh form differ by at most 5e-4 a value
        assert apart(plain, twins.peer("gpt2", **SHAPES[shape]), ids) > least, shape


def test_greedy_tokens_are_those_of_transformers(twins, greedy, peer_greedy, ids):
    ours, theirs = twins("gpt2")
    assert torch.equal(greedy(ours, ids[:1, :9], 64), peer_greedy(theirs, ids[:1, :9], 64))


def test_gradients_are_those_of_transformers(twins, ids):
    ours, theirs = twins("gpt2")
    ours(ids).logsumexp(dim=-1).sum().backward()
    theirs(ids).logits.logsumexp(dim=-1).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        g = wanted[name].grad.T if name.endswith(FAMILY.transposed) else wanted[name].grad
        assert (p.grad - g).abs().max() <= 2e-5 * g.abs().max(), name


class TestSorter:
    """A real GPT-2 that sorts six letters of A, B, C (fixtures/gpt-nano-sort)."""

    def test_logits(self, assets, apart):
        folder = assets / "fixtures" / "gpt-nano-sort"
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        ids = torch.randint(0, 3, (16, 11), generator=torch.Generator().manual_seed(0))
        ours = load_model(folder)
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4

    def test_it_sorts_every_word(self, assets):
        model = load_model(assets / "fixtures" / "gpt-nano-sort")
        words = torch.cartesian_prod(*[torch.arange(3)] * 6)  # [729, 6]
        cache = model.new_cache(len(words), 11)
        step, answer = words, []
        with torch.no_grad():
            for _ in range(6):
                step = model(step, cache=cache)[:, -1:].argmax(dim=-1)  # [729, 1]
                answer.append(step)
        assert torch.equal(torch.cat(answer, dim=1), words.sort(dim=1).values)

    def test_greedy_tokens_to_the_end_of_the_context(self, assets, greedy, peer_greedy):
        folder = assets / "fixtures" / "gpt-nano-sort"
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        ids = torch.tensor([[2, 0, 1, 1, 2, 0]])
        assert torch.equal(greedy(load_model(folder), ids, 5), peer_greedy(theirs, ids, 5))


class TestDropout:
    """The dropout of config.json holds in training mode, at GPT-2's four places, and nowhere in eval mode."""

    config = GPT2Config(
        vocab_size=11, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.2, embd_pdrop=0.4, attn_pdrop=0.3
    )

    def model(self, **changes: float) -> GPT2:
        zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        given = {k: v for k, v in vars(self.config).items() if k not in zero}
        model = GPT2(GPT2Config(**given, **(zero | changes)))
        model.initialize(torch.Generator().manual_seed(0))
        return model

    @pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
    def test_each_kind_changes_training_and_not_evaluation(self, name, ids):
        ids, model = ids % 11, self.model(**{name: 0.5})
        plain = self.model()(ids)
        assert torch.equal(model.eval()(ids), plain)
        assert not torch.allclose(model.train()(ids), plain, atol=1e-3)

    def test_without_any_training_is_evaluation(self, ids):
        model = self.model()
        assert torch.equal(model.train()(ids % 11), model.eval()(ids % 11))

    def test_what_is_dropped_has_the_configs_share(self, ids):
        """Count zeros behind each nn.Dropout: of n = 3840 or more values the share is p +- 4 sqrt(p (1-p) / n)."""
        model = GPT2(self.config).train()
        model.initialize(torch.Generator().manual_seed(0))
        shares: dict[str, float] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                keep = lambda _, before, after, name=name: shares.update({name: float((after == 0).float().mean())})
                module.register_forward_hook(keep)
        torch.manual_seed(0)
        model(torch.cat([ids, ids]) % 11)
        expected = {"transformer.drop": 0.4}
        expected |= {f"transformer.h.{i}.{part}": 0.2 for i in (0, 1) for part in ("attn.resid_dropout", "mlp.dropout")}
        assert shares.keys() == expected.keys()
        for name, share in shares.items():
            assert abs(share - expected[name]) < 4 * (0.25 / 3840) ** 0.5, name

    def test_attention_drops_probabilities(self):
        """With scores 0 and values 1, a query over n keys gives y = (kept of n) / (n (1 - p)): mean 1, known spread."""
        model = self.model(attn_pdrop=0.3).train()
        attention = model.blocks[0].attn
        with torch.no_grad():
            attention.c_attn.weight.zero_()
            attention.c_attn.bias.copy_(torch.cat([torch.zeros(64), torch.ones(32)]))
            attention.c_proj.weight.copy_(torch.eye(32))
        seen = []
        attention.register_forward_hook(lambda _, given, y: seen.append(y[:, -1, ::8]))  # one value a head: [B, H]
        torch.manual_seed(0)
        model(torch.zeros(500, 64, dtype=torch.long))
        y, n, p = seen[0].detach(), 64, 0.3  # [500, 4]
        spread = (p / ((1 - p) * n)) ** 0.5
        assert abs(float(y.mean()) - 1) < 4 * spread / 2000**0.5
        assert abs(float(y.std()) / spread - 1) < 0.1


class TestTableOfPositions:
    def model(self, virtual_tokens: int = 0) -> GPT2:
        model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
        model.virtual_tokens = virtual_tokens
        return model

    def test_a_row_that_fills_it_passes(self):
        assert self.model()(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 11)

    def test_one_token_more_is_an_error_that_says_what_to_cut(self):
        with pytest.raises(InputError, match=r"position 8, but .* n_positions=8\. cut each document to 8 tokens"):
            self.model()(torch.zeros(1, 9, dtype=torch.long))

    def test_learned_columns_count(self):
        with pytest.raises(InputError, match=r"position 8, .* 3 are virtual tokens\. cut each document to 5 tokens"):
            self.model(virtual_tokens=3)(torch.zeros(1, 6, dtype=torch.long))

    def test_a_packed_row_may_be_longer_than_the_table(self):
        documents = torch.tensor([[0] * 8 + [1] * 8 + [-1] * 20])
        assert self.model()(torch.zeros(1, 36, dtype=torch.long), documents).isfinite().all()
        documents[0, 16] = 1
        with pytest.raises(InputError, match="position 8"):
            self.model()(torch.zeros(1, 36, dtype=torch.long), documents)

    def test_the_decode_step_that_steps_over(self):
        model = self.model()
        cache = model.new_cache(1, 20)
        model(torch.zeros(1, 7, dtype=torch.long), cache=cache)
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
        with pytest.raises(InputError, match="cut each document to 8 tokens"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)

    def test_left_padding_takes_no_position(self):
        model = self.model()
        documents = torch.tensor([[-1] * 20 + [0] * 8])
        assert torch.allclose(
            model(torch.ones(1, 28, dtype=torch.long), documents)[:, 20:],
            model(torch.ones(1, 8, dtype=torch.long)),
            atol=1e-6,
        )


def test_fresh_weights_have_gpt2s_spread():
    model = GPT2(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=4))
    model.initialize(torch.Generator().manual_seed(0))
    state = model.state_dict()
    for name, spread in (
        ("transformer.wte.weight", 0.02),
        ("transformer.h.3.mlp.c_fc.weight", 0.02),
        ("transformer.h.3.mlp.c_proj.weight", 0.005),
    ):
        assert abs(float(state[name].std()) / spread - 1) < 0.05, name
    assert float(state["transformer.h.0.ln_1.weight"].min()) == 1
    assert all(float(p.abs().max()) == 0 for name, p in state.items() if name.endswith("bias"))
