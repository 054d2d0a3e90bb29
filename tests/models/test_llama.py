"""Llama against transformers' on the same weights: grouped queries, rotary settings in both spellings, a real one."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model
from minipeft.models.llama import LlamaConfig, RMSNorm
from minipeft.models.rotary import rotate

SHAPES = {
    "grouped queries": {},
    "one key/value head": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "two of eight": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "eight of eight": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "kv heads null": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 12},
    "narrow heads": {"head_dim": 2},
    "odd sizes": {"vocab_size": 67, "hidden_size": 27, "intermediate_size": 53, "num_attention_heads": 3,
                  "num_key_value_heads": 3, "head_dim": 10},
    "one layer": {"num_hidden_layers": 1},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both biases": {"attention_bias": True, "mlp_bias": True},
    "wide epsilon": {"rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "default": (10000.0, {}),
    "another theta": (50.0, {}),
    "linear": (10000.0, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (500.0, {"rope_type": "llama3", **LLAMA3}),
    "yarn": (500.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "llama3, whole numbers": (500, {"rope_type": "llama3", **LLAMA3, "factor": 8, "low_freq_factor": 1}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, twins, apart, ids):
    ours, theirs = twins("llama", **SHAPES[shape])
    assert apart(ours, theirs, ids) <= 2e-5


def test_greedy_tokens_are_those_of_transformers(twins, greedy, peer_greedy, ids):
    ours, theirs = twins("llama")
    assert torch.equal(greedy(ours, ids[:1, :9], 64), peer_greedy(theirs, ids[:1, :9], 64))


def test_gradients_are_those_of_transformers(twins, ids):
    ours, theirs = twins("llama", attention_bias=True)
    ours(ids).logsumexp(dim=-1).sum().backward()
    theirs(ids).logits.logsumexp(dim=-1).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - wanted[name].grad).abs().max() <= 5e-5 * wanted[name].grad.abs().max(), name


class TestRotary:
    def folder(self, twins, spelling, theta, scaling):
        """A checkpoint whose config.json has the rotary settings of transformers 4 or 5."""
        folder = twins.save(twins.peer("llama"))
        config = json.loads((folder / "config.json").read_text())
        for name in ("rope_parameters", "rope_scaling", "rope_theta"):
            config.pop(name, None)
        if spelling == "v5":
            config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", **scaling}
        else:
            old = {"type" if spelling == "v4, old" and k == "rope_type" else k: v for k, v in scaling.items()}
            config |= {"rope_theta": theta, "rope_scaling": old or None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize("spelling", ["v4", "v4, old", "v5"])
    @pytest.mark.parametrize("rope", ROPES)
    def test_each_type_in_each_spelling(self, rope, spelling, twins, apart, ids):
        folder = self.folder(twins, spelling, *ROPES[rope])
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
        assert theirs.config.rope_parameters["rope_type"] == ROPES[rope][1].get("rope_type", "default")
        assert apart(load_model(folder), theirs, ids) <= 2e-5

    def test_the_types_differ(self, twins, apart, ids):
        plain = load_model(self.folder(twins, "v5", *ROPES["default"]))
        for rope in ("another theta", "linear", "llama3", "yarn"):
            theirs = transformers.LlamaForCausalLM.from_pretrained(self.folder(twins, "v5", *ROPES[rope])).eval()
            assert apart(plain, theirs, ids) > 1e-2, rope

    def test_a_config_without_any_setting_has_theta_10000(self, twins, apart, ids):
        folder = self.folder(twins, "v4", 10000.0, {})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("rope")}))
        assert apart(load_model(folder), twins.peer("llama"), ids) <= 2e-5

    @pytest.mark.parametrize("kind", ["dynamic", "proportional", "magic", 3, ["linear"], None])
    @pytest.mark.parametrize("spelling", ["v4", "v4, old", "v5"])
    def test_any_other_type_raises(self, kind, spelling, twins):
        folder = self.folder(twins, spelling, 10000.0, {"rope_type": kind, "factor": 2.0})
        with pytest.raises(
            InputError, match=r"config\.json: rope_scaling: rope type .* \(default, linear, llama3, yarn, longrope\)"
        ):
            load_model(folder)

    @pytest.mark.parametrize(
        ("scaling", "says"),
        [
            ({"rope_type": "linear"}, "rope_scaling.factor: None must be a finite number > 0"),
            ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor: 0 must be"),
            ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor: '2' must be"),
            ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": -1.0}, "rope_scaling.low_freq_factor: -1.0 must be"),
            ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "must be above low_freq_factor"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ],
    )
    def test_a_wrong_setting_raises(self, scaling, says, twins):
        with pytest.raises(InputError) as error:
            load_model(self.folder(twins, "v5", 10000.0, scaling))
        assert says in str(error.value)

    def test_scores_depend_on_distance_alone(self):
        """<rotate(q, m), rotate(k, n)> is a function of m - n (Su et al. 2021, eq. 11), here in complex numbers."""
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator)
        turn = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)  # [D / 2]

        def turned(x, position):
            angles = torch.cat([position * turn] * 2)  # [D]
            return rotate(x, (angles.cos(), angles.sin()))

        def complex_turned(x, position):
            return torch.complex(x[:4], x[4:]) * torch.exp(1j * position * turn)

        assert torch.allclose(turned(q, 5), torch.view_as_real(complex_turned(q, 5)).T.flatten(), atol=1e-12)
        scores = [turned(q, 3 + shift) @ turned(k, 10 + shift) for shift in (0, 1, 100)]
        assert torch.allclose(torch.stack(scores), scores[0], atol=1e-12)


def test_norm_is_computed_in_float32_for_bfloat16():
    x = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 300).bfloat16()
    norm = RMSNorm(64, 1e-6).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (norm(x).double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()  # one rounding to 8 bits


class TestStories:
    """A real Llama of 260,000 parameters (fixtures/stories260K), with transformers' logits and text on file."""

    def test_logits(self, assets):
        folder = assets / "fixtures" / "stories260K"
        golden = load_file(folder / "golden_logits.safetensors")
        with torch.no_grad():
            assert (load_model(folder)(golden["input_ids"]) - golden["llama_logits"]).abs().max() <= 1e-4

    def test_logits_now(self, assets, apart):
        folder = assets / "fixtures" / "stories260K"
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
        ids = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(0))
        assert apart(load_model(folder), theirs, ids) <= 2e-5

    def test_greedy_tokens(self, assets, greedy):
        folder = assets / "fixtures" / "stories260K"
        golden = json.loads((folder / "greedy_256.json").read_text())
        start = torch.tensor([[golden["bos"]]])
        wanted = golden["greedy_ids"]
        assert len(wanted) >= 65
        assert greedy(load_model(folder), start, len(wanted) - 1)[0].tolist() == wanted


@pytest.fixture(scope="module")
def real_pair(real_model):
    theirs = transformers.LlamaForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    return load_model(real_model, dtype=torch.float32), theirs


@pytest.fixture(scope="module")
def real_prompt(real_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    return tokenizer("def quicksort(values):\n", return_tensors="pt")["input_ids"]


class TestRealModel:
    """SmolLM2-135M-Instruct (Q4_1-dequantised): 30 layers, 9 query and 3 key/value heads, bfloat16 on disk."""

    def test_logits(self, real_pair, real_prompt):
        ours, theirs = real_pair
        ids = torch.cat(
            [real_prompt, torch.randint(0, 49152, (1, 60), generator=torch.Generator().manual_seed(0))], dim=1
        )
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4

    def test_greedy_tokens(self, real_pair, real_prompt, greedy):
        """Each of our 64 tokens is transformers' most probable next one, so its greedy text is ours."""
        ours, theirs = real_pair
        ids = greedy(ours, real_prompt, 64)
        with torch.no_grad():
            likeliest = theirs(ids).logits.argmax(dim=-1)  # [1, T + 64]
        start = real_prompt.shape[1]
        assert torch.equal(ids[:, start:], likeliest[:, start - 1 : -1])

    def test_its_own_dtype_is_kept(self, real_model):
        model = load_model(real_model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight is model.embedding.weight


def test_rotary_settings_that_disagree_are_refused():
    """If both are given transformers reads rope_scaling; a reader of rope_parameters would compute another model."""
    both = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    same = LlamaConfig.from_json({**both, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert same["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    for other, said in (
        ({"type": "linear", "factor": 4.0}, r"rope_scaling\.factor: 4\.0, but rope_parameters has 2\.0"),
        (
            {"rope_type": "llama3", "factor": 2.0},
            r"rope_scaling\.rope_type: 'llama3', but rope_parameters has 'linear'",
        ),
    ):
        with pytest.raises(InputError, match=said):
            LlamaConfig.from_json({**both, "rope_scaling": other})
