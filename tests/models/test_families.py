"""Each family against transformers on tiny random models, and every adapter on each family.

A family is a table of fields with the values to draw from. The last value of each is the rich one: together
they turn on every feature of the family, for the negative controls. MINIPEFT_TRIALS multiplies the number of drawn
configurations, MINIPEFT_SEED moves them; a test's name ends in its seed.
"""

import copy
import dataclasses
import json
import os
import random
import tempfile
from contextlib import closing
from functools import cache

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import minipeft
from minipeft import Batch
from minipeft.adapters.ln_tuning import list_default_names
from minipeft.documents import PADDING, VIRTUAL
from minipeft.errors import InputError
from minipeft.models import FAMILIES, REFUSED
from minipeft.models.checkpoint import load_model, read_config, save_model
from minipeft.models.quantized import dequantize_model, is_quantized, quantize_model
from minipeft.runs.checkpoints import open_run

transformers.logging.set_verbosity_error()

TRIALS = max(1, round(3 * float(os.environ.get("MINIPEFT_TRIALS", "1"))))
FIRST = int(os.environ.get("MINIPEFT_SEED", "0"))

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
ROPES = (PLAIN, {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}, {**LLAMA3, "rope_theta": 500.0},
         {**YARN, "rope_theta": 1e4, "attention_factor": 0.7}, {**YARN, "rope_theta": 200.0, "beta_fast": 8},
         {**YARN, "rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 1.3})  # fmt: skip
NESTED = tuple({"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
               for full, local in zip(ROPES, (30.0, 70.0, 10.0, 20.0, 50.0, 40.0), strict=True))  # fmt: skip
SHAPE = {"vocab_size": (61, 67), "hidden_size": (24, 36, 48), "intermediate_size": (17, 48, 61),
         "num_hidden_layers": (4, 3, 2), "heads": ((3, 3), (3, 1), (6, 6), (6, 3), (6, 2)),
         "max_position_embeddings": (96,), "tie_word_embeddings": (True, False)}  # fmt: skip
LLAMA = {**SHAPE, "rms_norm_eps": (1e-6, 1e-5, 0.1), "rope_parameters": ROPES}
WIDE = {"head_dim": (4, 6, 10, 12)}
GEMMA = {**LLAMA, **WIDE, "rope_parameters": ROPES[:1]}
CAPPED = {"query_pre_attn_scalar": (16, 5), "sliding_window": (9, 5)}


def long_rope(pairs, theta=100.0, **fields):
    """A LongRoPE setting for heads of which 2 * pairs dimensions turn."""
    short, long = [1.0 + 0.25 * i for i in range(pairs)], [2.0 + i for i in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": theta, "short_factor": short, "long_factor": long, **fields}


FIELDS = {
    "llama": {**LLAMA, **WIDE, "attention_bias": (False, True), "mlp_bias": (False, True)},
    "mistral": {**LLAMA, **WIDE, "sliding_window": (None, 2, 5)},  # at 1 transformers' cache keeps all keys: [-0:]
    "qwen2": {**LLAMA, "use_sliding_window": (False, True), "sliding_window": (7, 5), "max_window_layers": (3, 0, 1)},
    "qwen3": {**LLAMA, **WIDE, "use_sliding_window": (False, True), "sliding_window": (7, 5),
              "max_window_layers": (3, 0, 1), "attention_bias": (False, True)},
    "smollm3": {**LLAMA, "no_rope_layer_interval": (4, 3, 2), "use_sliding_window": (False, True),
                "sliding_window": (7, 5), "attention_bias": (False, True), "mlp_bias": (False, True)},
    "granite": {**LLAMA, "embedding_multiplier": (1.0, 12.0), "logits_scaling": (1.0, 8.0, 3.0),
                "residual_multiplier": (1.0, 0.22), "attention_multiplier": (0.3, 0.0625),
                "attention_bias": (False, True), "mlp_bias": (False, True)},
    "olmo2": {**LLAMA, "attention_bias": (False, True)},
    "olmo3": {**LLAMA, "attention_bias": (False, True), "sliding_window": (7, 5), "rope_parameters": NESTED,
              "num_hidden_layers": (5, 4)},
    "gemma": {**GEMMA, "hidden_act": ("gelu_pytorch_tanh", "gelu"), "attention_bias": (False, True)},
    "gemma2": {**GEMMA, **CAPPED, "attn_logit_softcapping": (None, 50.0, 1.5),
               "final_logit_softcapping": (None, 30.0, 5.0)},
    "gemma3_text": {**GEMMA, **CAPPED, "attn_logit_softcapping": (2.0, None), "rope_parameters": NESTED,
                    "final_logit_softcapping": (None, 5.0), "sliding_window_pattern": (3, 2)},
    "starcoder2": {**SHAPE, "norm_epsilon": (1e-5, 0.1), "use_bias": (False, True), "sliding_window": (None, 7, 5),
                   "rope_parameters": ROPES},
    "phi3": {**LLAMA, "hidden_size": (24, 48), "heads": ((3, 3), (3, 1)), "sliding_window": (None, 7, 5),
             "rope_parameters": ({**PLAIN, "partial_rotary_factor": 0.5}, PLAIN, "long 4-mini", "long"),
             "original_max_position_embeddings": (48, 32)},
    "phi": {**SHAPE, "hidden_size": (24, 48), "heads": ((3, 3), (3, 1)), "layer_norm_eps": (1e-5, 0.1),
            "rope_parameters": tuple({**rope, "partial_rotary_factor": 0.5} for rope in ROPES[:3]),
            "qk_layernorm": (False, True), "hidden_act": ("gelu", "gelu_new")},
    "gpt_neox": {**SHAPE, "hidden_size": (48, 96), "heads": ((3, 3), (6, 6)), "layer_norm_eps": (1e-5, 0.1),
                 "rope_parameters": ({**PLAIN, "partial_rotary_factor": 1.0}, {**PLAIN, "partial_rotary_factor": 0.25}),
                 "attention_bias": (False, True), "use_parallel_residual": (False, True)},
}  # fmt: skip
PEERS = sorted(set(FAMILIES) - {"gpt2"})  # gpt2 has its own file
METHODS = {
    "full": minipeft.FullConfig(),
    "lora": minipeft.LoRAConfig(rank=3, targets="all-linear"),
    "dora": minipeft.LoRAConfig(rank=3, targets="all-linear", dora=True),
    "ia3": minipeft.IA3Config(),
    "ln_tuning": minipeft.LNTuningConfig(),
    "vera": minipeft.VeRAConfig(rank=5, targets="all-linear"),
    "prefix": minipeft.PrefixConfig(length=4),
    "prompt": minipeft.PromptConfig(length=4),
}


def test_every_family_is_here():
    assert sorted(FIELDS) == PEERS


def settle(chosen):
    """Chosen fields as a transformers config takes them."""
    chosen = dict(chosen)
    chosen["num_attention_heads"], chosen["num_key_value_heads"] = chosen.pop("heads")
    if isinstance(kind := chosen["rope_parameters"], str):  # its lists are as long as a head
        width, part = chosen["hidden_size"] // chosen["num_attention_heads"], 0.75 if "mini" in kind else 1.0
        chosen["rope_parameters"] = long_rope(int(width * part) // 2, partial_rotary_factor=part)
    return {**chosen, "pad_token_id": None}


def draw(family, seed):
    """A configuration of the family."""
    generator = random.Random(f"{family} {seed}")
    return settle({name: generator.choice(choices) for name, choices in FIELDS[family].items()})


def rich(family):
    """The configuration with every feature of the family."""
    return settle({name: choices[-1] for name, choices in FIELDS[family].items()})


def make_peer(family, fields, seed=0):
    """A transformers model in eval mode, every parameter random: norms around 1, biases around 0."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family](**copy.deepcopy(fields))
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    one = 0.0 if "gemma" in family else 1.0  # a Gemma norm multiplies by 1 + weight
    with torch.no_grad():
        for name, p in peer.named_parameters():
            norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(torch.randn(p.shape, generator=generator) * 0.25 + (one if norm else 0.0))
    return peer


def both(family, fields, folder, seed=0):
    """(ours, theirs): ours from the folder that transformers saves."""
    peer = make_peer(family, fields, seed)
    peer.save_pretrained(folder)
    return load_model(folder), peer


@cache
def drawn_pair(family, seed):
    """Both models of a drawn configuration; tests change a copy."""
    with tempfile.TemporaryDirectory() as folder:
        return both(family, draw(family, seed), folder, seed)


@cache
def rich_pair(family):
    """Both models of the family's rich configuration; tests change a copy."""
    with tempfile.TemporaryDirectory() as folder:
        return both(family, rich(family), folder)


def rows(seed=0, batch=2, length=24):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def apart(ours, theirs):
    """max |ours - theirs| / max |theirs|"""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def step_by_step(model, ids, prefill):
    """Our logits with the decode cache: `prefill` tokens at once, then one at a time."""
    past = model.new_cache(*ids.shape)
    pieces = [ids[:, :prefill], *ids[:, prefill:].split(1, dim=1)]
    return torch.cat([model(piece, cache=past) for piece in pieces], dim=1)


def peer_step_by_step(peer, ids, prefill):
    """The same by transformers."""
    past, logits = None, []
    for piece in [ids[:, :prefill], *ids[:, prefill:].split(1, dim=1)]:
        out = peer(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + TRIALS))
@pytest.mark.parametrize("family", PEERS)
class TestAgainstTransformers:
    @pytest.fixture
    def pair(self, family, seed):
        print(json.dumps(draw(family, seed)))
        return drawn_pair(family, seed)

    @torch.no_grad()
    def test_logits(self, family, seed, pair, tmp_path):
        """Whole, with the cache, left-padded, and from the folder that we save."""
        ours, theirs = pair
        ids = rows(seed)
        wanted = theirs(ids).logits
        assert apart(ours(ids), wanted) <= 2e-5
        assert apart(step_by_step(ours, ids, 9), peer_step_by_step(theirs, ids, 9)) <= 2e-5
        padding = torch.zeros(2, 24, dtype=torch.bool)
        padding[1, :7] = True
        positions = ((~padding).cumsum(dim=1) - 1).clamp(min=0)
        wanted_padded = theirs(ids, attention_mask=(~padding).long(), position_ids=positions).logits
        got = ours(ids, documents=torch.where(padding, PADDING, 0))
        assert apart(got[~padding], wanted_padded[~padding]) <= 2e-5
        save_model(ours, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
        assert apart(again(ids).logits, wanted) <= 1e-6

    @torch.no_grad()
    def test_bfloat16(self, family, seed, pair):
        """No further from float32 than transformers' own bfloat16; over 4 rows one ratio is 0.84 to 1.32."""
        ours, theirs = pair
        ids = rows(seed, batch=32)
        half = copy.deepcopy(theirs).bfloat16()
        theirs = copy.deepcopy(half).float()  # float32 with the rounded weights
        exact = theirs(ids).logits
        error = lambda logits: float((logits.float() - exact).square().mean().sqrt())
        assert error(copy.deepcopy(ours).bfloat16()(ids)) <= 1.2 * error(half(ids).logits) + 1e-6


def without(*names):
    """A change of our model: remove these norms or biases from each attention."""

    def change(model):
        for name, p in model.named_parameters():
            if name.endswith(names):
                p.data = torch.zeros_like(p)

    return change


def unnormed(*names):
    """A change of our model: these norms pass their input on."""

    def change(model):
        for module in list(model.modules()):
            for name in names:
                if hasattr(module, name):
                    delattr(module, name)
                    setattr(module, name, torch.nn.Identity())

    return change


QK = unnormed("q_norm", "k_norm")
NO_WINDOW = {"sliding_window": None}
PLAIN_ROPE = {"rope_parameters": PLAIN}
SWITCHES = {  # family -> what is taken away: fields of config.json, or a change of our model
    "llama": [without("bias"), PLAIN_ROPE],
    "mistral": [NO_WINDOW, PLAIN_ROPE],
    "qwen2": [{"use_sliding_window": False}, {"max_window_layers": 3, "layer_types": None}, without("bias")],
    "qwen3": [{"use_sliding_window": False}, QK, without("bias")],
    "smollm3": [NO_WINDOW, {"no_rope_layers": [1, 1]}],
    "granite": [{name: 1.0} for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier",
                                         "attention_multiplier")],
    "olmo2": [QK, unnormed("post_attention_layernorm"), PLAIN_ROPE],
    "olmo3": [QK, NO_WINDOW, {"rope_parameters": {**NESTED[-1], "full_attention": PLAIN}}],
    "gemma": [{"hidden_act": "silu"}, lambda model: vars(model).update(look_up=model.embedding)],
    "gemma2": [NO_WINDOW, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None},
               {"query_pre_attn_scalar": 10}, unnormed("post_feedforward_layernorm")],
    "gemma3_text": [NO_WINDOW, QK, {"query_pre_attn_scalar": 10}, {"final_logit_softcapping": None},
                    {"rope_parameters": {**NESTED[-1], "full_attention": PLAIN}},
                    {"rope_parameters": {**NESTED[-1], "sliding_attention": {"rope_theta": 1e4}}}],
    "starcoder2": [NO_WINDOW, without("bias"), {"hidden_act": "relu"}],
    "phi3": [NO_WINDOW, {"rope_parameters": PLAIN}],
    "phi": [{"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}, without("lm_head.bias"), without("fc1.bias"),
            unnormed("q_layernorm", "k_layernorm")],
    "gpt_neox": [{"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, {"use_parallel_residual": False},
                 without("query_key_value.bias")],
}  # fmt: skip


@pytest.mark.parametrize("family", PEERS)
@torch.no_grad()
def test_each_switch_counts(family, tmp_path):
    """Negative control: with any one switch off, logits differ by > 1e-3."""
    ours, theirs = both(family, rich(family), tmp_path)
    wanted = theirs(rows()).logits
    assert apart(ours(rows()), wanted) <= 2e-5
    text = (tmp_path / "config.json").read_text()
    for number, switch in enumerate(SWITCHES[family]):
        config = json.loads(text) | (switch if isinstance(switch, dict) else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = load_model(tmp_path)
        if not isinstance(switch, dict):
            switch(model)
        assert apart(model(rows()), wanted) > 1e-3, (family, number)


class Words:
    """A tokenizer of one id a word."""

    bos = None

    def encode(self, text):
        return [len(word) * 5 % 61 for word in text.split()]


def rich_model(family):
    """Our model of the rich configuration; tests change a copy."""
    return rich_pair(family)[0]


def adapted(family, method, moved=True):
    """A copy with an adapter whose trained parameters stand, if moved, away from their init."""
    model = copy.deepcopy(rich_model(family))
    minipeft.add_adapter(model, METHODS[method], Words())
    if moved:
        move(model)
    return model


@cache
def tuned(family, method):
    """The same for tests that change nothing."""
    return adapted(family, method)


def move(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=generator))


def packed_apart(model):
    documents = torch.tensor([[0] * 11 + [1] * 13])
    ids = rows(batch=1)
    packed = model(ids, documents=documents)
    return apart(packed, torch.cat([model(ids[:, :11]), model(ids[:, 11:])], dim=1))


def cached_apart(model):
    ids = rows(length=14)  # windows are of 5 tokens
    return apart(step_by_step(model, ids, 7), model(ids))


def padded_apart(model):
    ids = rows(batch=1)
    documents = torch.tensor([[PADDING] * 5 + [0] * 19])
    return apart(model(ids, documents=documents)[:, 5:], model(ids[:, 5:]))


PROPERTIES = [packed_apart, cached_apart, padded_apart]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", PEERS)
class TestAdapters:
    @torch.no_grad()
    def test_rows_do_not_hear_one_another(self, family, method):
        model = tuned(family, method)
        for holds in PROPERTIES:
            assert holds(model) <= 1e-5, holds.__name__

    def test_activation_checkpointing_changes_no_gradient(self, family, method):
        found, model = [], adapted(family, method).train()
        for on in (False, True):
            model.zero_grad()
            model.activation_checkpointing = on
            loss = model.loss(rows(), rows())
            loss.backward()
            found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert all(g is not None for g in found[0])
        assert any(g.abs().max() > 0 for g in found[0][1:])
        assert all(map(torch.equal, *found))

    def test_loss_is_that_of_the_logits(self, family, method):
        model, ids = tuned(family, method), rows()
        model.zero_grad()
        loss = model.loss(ids, ids)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        wanted = torch.nn.functional.cross_entropy(
            model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        wanted.backward()
        assert abs(loss - wanted) <= 1e-5 * wanted
        largest = max(g.abs().max() for g in grads)
        for p, grad in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
            assert (p.grad - grad).abs().max() <= 2e-5 * largest

    @torch.no_grad()
    def test_init_changes_nothing(self, family, method):
        """A prefix and a prompt start as if their text, which no window hides, stood before the row."""
        base, model, ids = rich_model(family), adapted(family, method, moved=False), rows()
        if not model.virtual_tokens:
            assert apart(model(ids), base(ids)) <= 1e-5
            return
        text = (Words().encode(METHODS[method].text) * 4)[: model.virtual_tokens]
        before = torch.tensor([text]).expand(2, -1)
        documents = torch.cat([torch.full_like(before, VIRTUAL), torch.zeros_like(ids)], dim=1)
        wanted = base(torch.cat([before, ids], dim=1), documents=documents)[:, len(text) :]
        assert apart(model(ids), wanted) <= 1e-5

    @torch.no_grad()
    def test_merge(self, family, method):
        model = adapted(family, method)
        wanted = model(rows())
        if method in ("full", "prefix", "prompt"):
            with pytest.raises(InputError, match="merge"):
                minipeft.merge_adapter(model)
            return
        minipeft.merge_adapter(model)
        assert apart(model(rows()), wanted) <= 2e-5
        assert dict(model.named_modules()).keys() == dict(rich_model(family).named_modules()).keys()

    @torch.no_grad()
    def test_save_and_load(self, family, method, tmp_path):
        model = tuned(family, method)
        if method == "full":
            save_model(model, tmp_path)
            again = load_model(tmp_path)
        else:
            minipeft.save_adapter(model, tmp_path)
            again = copy.deepcopy(rich_model(family))
            minipeft.load_adapter(again, tmp_path)
        assert torch.equal(again.eval()(rows()), model(rows()))

    def test_resume(self, family, method, tmp_path):
        """Two steps are those of a run that was saved after the first, in another model, to the bit."""
        rows_of = [Batch(rows(number), rows(number), torch.zeros_like(rows())) for number in range(2)]
        settings = minipeft.TrainConfig(2, learning_rate=1e-2)
        whole = adapted(family, method, moved=False)
        losses = [step.loss for step in minipeft.train(whole, rows_of, settings)]
        before = adapted(family, method, moved=False)
        state = minipeft.TrainState(before)
        assert next(minipeft.train(before, rows_of, settings, state)).loss == losses[0]
        with closing(open_run(tmp_path, {}, resume=False, overwrite=False)) as run:
            run.save(before, state)
        resumed = adapted(family, method)
        state = minipeft.TrainState(resumed)
        with closing(open_run(tmp_path, {}, resume=True, overwrite=False)) as run:
            run.restore(resumed, state)
        assert state.step == 1
        assert [step.loss for step in minipeft.train(resumed, rows_of, settings, state)] == losses[1:]
        for (name, p), (_, wanted) in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(p, wanted), name
        assert not all(map(torch.equal, before.parameters(), whole.parameters()))  # the second step changes them


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "ln_tuning")])
@pytest.mark.parametrize("family", PEERS)
def test_a_quantized_base_is_the_base_of_its_values(family, method):
    """Every answer and gradient is that of a plain base which holds the dequantized values."""
    quantized = copy.deepcopy(rich_model(family))
    quantize_model(quantized, "nf4" if len(family) % 2 else "int8")
    plain = copy.deepcopy(quantized)
    dequantize_model(plain)
    documents = torch.tensor([[0] * 11 + [1] * 13] * 2)
    found = []
    for model in (quantized, plain):
        minipeft.add_adapter(model, METHODS[method], Words())
        move(model)
        with torch.no_grad():
            answers = [model(rows(), documents=documents)]
            if method in ("lora", "prefix"):
                answers.append(step_by_step(model, rows()[:, :12], 9))
        model.train().activation_checkpointing = True
        loss = model.loss(rows(), rows(), documents)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([*answers, loss, *grads])
    assert len(grads) > 0
    assert is_quantized(quantized) > is_quantized(plain)
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("family", PEERS)
class TestFilesOfPeft:
    @torch.no_grad()
    def test_peft_reads_ours(self, family, method, tmp_path):
        base, peer = copy.deepcopy(rich_pair(family))
        config = METHODS[method]
        if method in ("prefix", "prompt"):
            config = dataclasses.replace(config, windowed=True)  # as transformers has it
        minipeft.add_adapter(base, config, Words())
        for p in base.parameters():
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        minipeft.save_adapter(base, tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
        assert apart(base.eval()(rows()), theirs(rows()).logits[:, -24:]) <= 2e-5  # PEFT leaves the prompt's in

    @torch.no_grad()
    def test_we_read_pefts(self, family, method, tmp_path):
        base, peer = copy.deepcopy(rich_pair(family))
        theirs = peft.get_peft_model(peer, peft_config(family, method)).eval()
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        theirs.save_pretrained(tmp_path / "adapter")
        minipeft.load_adapter(base, tmp_path / "adapter")
        if base.virtual_tokens:
            base.windowed = True
        assert apart(base.eval()(rows()), theirs(rows()).logits[:, -24:]) <= 2e-5


def peft_config(family, method):
    """The method's config in PEFT, on the family's default targets."""
    targets = {name: list(linears) for name, linears in FAMILIES[family].default_targets.items()}
    if method == "ia3":
        return peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets["ia3"],
                              feedforward_modules=targets["ia3_feedforward"])  # fmt: skip
    if method == "ln_tuning":
        return peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=list(list_default_names(rich_model(family))))
    if method == "vera":
        return peft.VeraConfig(task_type="CAUSAL_LM", r=5, target_modules="all-linear")
    if method == "prefix":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    if method == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets["lora"], use_dora=method == "dora")


@pytest.mark.parametrize("family", sorted(PEERS))
def test_default_targets_are_pefts(family):
    """Where PEFT has default targets for the family, ours are the same; the others must name linears."""
    from peft.utils import constants

    ours = FAMILIES[family].default_targets
    tables = {"lora": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
              "ia3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
              "ia3_feedforward": constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING}  # fmt: skip
    for name, table in tables.items():
        if family in table:
            assert sorted(ours[name]) == sorted(table[family]), name
    linears = {name.rsplit(".", 1)[-1] for name, m in rich_model(family).named_modules() if type(m) is torch.nn.Linear}
    assert {target for targets in ours.values() for target in targets} <= linears


def full(**fields):
    """A config.json as files of transformers 4 have it."""
    return {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_scaling": None, "torch_dtype": "bfloat16", **fields}


def shape(width, inner, layers, heads, kv, vocab, **fields):
    return full(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv, vocab_size=vocab, **fields)  # fmt: skip


QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24}
GEMMA2 = {"model_type": "gemma2", "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
          "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
          "sliding_window": 4096, "cache_implementation": "hybrid"}  # fmt: skip
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
PYTHIA = {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25,
          "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False}  # fmt: skip
REAL = {  # checkpoint -> the fields of its config.json that matter, and its parameters in millions
    "meta-llama/Llama-3.1-8B": (shape(4096, 14336, 32, 32, 8, 128256, model_type="llama", rope_theta=500000.0,
                                      tie_word_embeddings=False, max_position_embeddings=131072,
                                      rope_scaling=LLAMA31), 8030),
    "meta-llama/Llama-3.2-1B": (shape(2048, 8192, 16, 32, 8, 128256, model_type="llama", rope_theta=500000.0,
                                      tie_word_embeddings=True, head_dim=64, max_position_embeddings=131072,
                                      rope_scaling={**LLAMA31, "factor": 32.0}), 1236),
    "meta-llama/Llama-3.2-3B": (shape(3072, 8192, 28, 24, 8, 128256, model_type="llama", rope_theta=500000.0,
                                      tie_word_embeddings=True, head_dim=128, max_position_embeddings=131072,
                                      rope_scaling={**LLAMA31, "factor": 32.0}), 3213),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (shape(2048, 5632, 22, 32, 4, 32000, model_type="llama",
                                                 tie_word_embeddings=False, max_position_embeddings=2048), 1100),
    "HuggingFaceTB/SmolLM2-360M": (shape(960, 2560, 32, 15, 5, 49152, model_type="llama", rope_theta=100000,
                                         tie_word_embeddings=True, max_position_embeddings=8192), 362),
    "HuggingFaceTB/SmolLM2-1.7B": (shape(2048, 8192, 24, 32, 32, 49152, model_type="llama", rope_theta=130000,
                                         tie_word_embeddings=True, max_position_embeddings=8192), 1711),
    "codellama/CodeLlama-7b-hf": (shape(4096, 11008, 32, 32, 32, 32016, model_type="llama", rope_theta=1e6,
                                        tie_word_embeddings=False, max_position_embeddings=16384), 6739),
    "deepseek-ai/deepseek-coder-1.3b-base": (shape(2048, 5504, 24, 16, 16, 32256, model_type="llama",
                                                   rope_theta=100000, tie_word_embeddings=False,
                                                   max_position_embeddings=16384,
                                                   rope_scaling={"type": "linear", "factor": 4.0}), 1346),
    "mistralai/Mistral-7B-v0.1": (shape(4096, 14336, 32, 32, 8, 32000, model_type="mistral", rope_theta=10000.0,
                                        tie_word_embeddings=False, sliding_window=4096,
                                        max_position_embeddings=32768), 7242),
    "mistralai/Mistral-7B-v0.3": (shape(4096, 14336, 32, 32, 8, 32768, model_type="mistral", rope_theta=1e6,
                                        tie_word_embeddings=False, sliding_window=None,
                                        max_position_embeddings=32768), 7248),
    "Qwen/Qwen2.5-1.5B": (shape(1536, 8960, 28, 12, 2, 151936, model_type="qwen2", rope_theta=1e6,
                                tie_word_embeddings=True, **QWEN_WINDOW), 1544),
    "Qwen/Qwen2.5-Coder-3B": (shape(2048, 11008, 36, 16, 2, 151936, model_type="qwen2", rope_theta=1e6,
                                    tie_word_embeddings=True, **QWEN_WINDOW), 3086),
    "Qwen/Qwen3-1.7B": (shape(2048, 6144, 28, 16, 8, 151936, model_type="qwen3", head_dim=128, rope_theta=1e6,
                              tie_word_embeddings=True, max_position_embeddings=40960), 1721),
    "Qwen/Qwen3-4B": (shape(2560, 9728, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, rope_theta=1e6,
                            tie_word_embeddings=True, max_position_embeddings=40960), 4022),
    "Qwen/Qwen2.5-0.5B": (shape(896, 4864, 24, 14, 2, 151936, model_type="qwen2", rope_theta=1e6,
                                tie_word_embeddings=True, **QWEN_WINDOW), 494),
    "Qwen/Qwen2.5-7B": (shape(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", rope_theta=1e6,
                              tie_word_embeddings=False, **QWEN_WINDOW), 7616),
    "Qwen/Qwen3-0.6B": (shape(1024, 3072, 28, 16, 8, 151936, model_type="qwen3", head_dim=128, rope_theta=1e6,
                              tie_word_embeddings=True, sliding_window=None, max_window_layers=28), 596),
    "Qwen/Qwen3-8B": (shape(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, rope_theta=1e6,
                            tie_word_embeddings=False, max_position_embeddings=40960), 8191),
    "HuggingFaceTB/SmolLM3-3B": (shape(2048, 11008, 36, 16, 4, 128256, model_type="smollm3", rope_theta=5e6,
                                       no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9,
                                       sliding_window=None, use_sliding_window=False), 3075),
    "ibm-granite/granite-3.1-2b-base": (shape(2048, 8192, 40, 32, 8, 49155, model_type="granite", rope_theta=5e6,
                                              embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
                                              attention_multiplier=0.015625, tie_word_embeddings=True), 2534),
    "allenai/OLMo-2-0425-1B": (shape(2048, 8192, 16, 16, 16, 100352, model_type="olmo2", rope_theta=500000,
                                     tie_word_embeddings=False), 1485),
    "allenai/OLMo-2-1124-7B": (shape(4096, 11008, 32, 32, 32, 100352, model_type="olmo2", rope_theta=500000,
                                     tie_word_embeddings=False), 7299),
    "google/gemma-2b": (shape(2048, 16384, 18, 8, 1, 256000, model_type="gemma", head_dim=256, hidden_act="gelu",
                              hidden_activation=None, rope_theta=10000.0), 2506),
    "google/gemma-3-1b-it": (shape(1152, 6912, 26, 4, 1, 262144, model_type="gemma3_text", head_dim=256,
                                   hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
                                   sliding_window=512, rope_theta=1e6, rope_local_base_freq=10000.0), 1000),
    "google/gemma-3-270m": (shape(640, 2048, 18, 4, 1, 262144, model_type="gemma3_text", head_dim=256,
                                  hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=512,
                                  rope_theta=1e6, rope_local_base_freq=10000.0), 268),
    "google/gemma-2-2b": (shape(2304, 9216, 26, 8, 4, 256000, **GEMMA2), 2614),
    "google/gemma-2-9b": (shape(3584, 14336, 42, 16, 8, 256000, **GEMMA2), 9242),
    "bigcode/starcoder2-3b": (full(model_type="starcoder2", hidden_size=3072, intermediate_size=12288,
                                   num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2, use_bias=True,
                                   vocab_size=49152, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh",
                                   rope_theta=999999.4420358813, sliding_window=4096, residual_dropout=0.1,
                                   embedding_dropout=0.1, attention_dropout=0.1), 3030),
    "bigcode/starcoder2-7b": (full(model_type="starcoder2", hidden_size=4608, intermediate_size=18432,
                                   num_hidden_layers=32, num_attention_heads=36, num_key_value_heads=4, use_bias=True,
                                   vocab_size=49152, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh",
                                   rope_theta=1000000, sliding_window=4096), 7174),
    "microsoft/Phi-3-mini-4k-instruct": (shape(3072, 8192, 32, 32, 32, 32064, model_type="phi3", sliding_window=2047,
                                               original_max_position_embeddings=4096), 3821),
    "microsoft/phi-4": (shape(5120, 17920, 40, 40, 10, 100352, model_type="phi3", rope_theta=250000,
                              tie_word_embeddings=False, max_position_embeddings=16384, sliding_window=None,
                              original_max_position_embeddings=16384), 14660),
    "microsoft/Phi-4-mini-instruct": (shape(3072, 8192, 32, 24, 8, 200064, model_type="phi3", tie_word_embeddings=True,
                                            partial_rotary_factor=0.75, max_position_embeddings=131072,
                                            sliding_window=262144, original_max_position_embeddings=4096,
                                            rope_scaling={"type": "longrope", "short_factor": [1.0] * 48,
                                                          "long_factor": [2.0] * 48}), 3836),
    "microsoft/phi-1": (full(model_type="phi", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                             num_attention_heads=32, vocab_size=51200, hidden_act="gelu_new", layer_norm_eps=1e-5,
                             partial_rotary_factor=0.5, qk_layernorm=False), 1418),
    "microsoft/phi-2": (full(model_type="phi", hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
                             num_attention_heads=32, vocab_size=51200, hidden_act="gelu_new", layer_norm_eps=1e-5,
                             partial_rotary_factor=0.4, resid_pdrop=0.1), 2780),
    "EleutherAI/pythia-160m": (full(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                    num_attention_heads=12, vocab_size=50304, **PYTHIA), 162.3),
    "EleutherAI/pythia-1b": (full(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                  num_attention_heads=8, vocab_size=50304, **PYTHIA), 1012),
    "EleutherAI/pythia-1.4b": (full(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                                    num_attention_heads=16, vocab_size=50304, **PYTHIA), 1415),
    "EleutherAI/pythia-14m": (full(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
                                   vocab_size=50304, **PYTHIA), 14.07),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_accepted(name, tmp_path):
    """Shapes and counts of published checkpoints, without their weights; the same in transformers."""
    config, millions = REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = read_config(tmp_path / "config.json")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = FAMILIES[config["model_type"]].decoder(ours)
        peer = transformers.AutoModelForCausalLM.from_config(theirs)
    assert {k: p.shape for k, p in model.named_parameters()} == {k: p.shape for k, p in peer.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.layers
    window = getattr(theirs, "sliding_window", None)
    assert [ours.window(i) for i in range(ours.layers)] == [window if "sliding" in t else None for t in types]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mixtral"}, "model_type: 'mixtral' is not supported: its MLPs are mixtures of experts"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported: its MLPs are mixtures of experts"),
        ({"model_type": "gpt_oss"}, "'gpt_oss' is not supported: its MLPs are mixtures of experts"),
        ({"model_type": "qwen3_5"}, "'qwen3_5' is not supported: three of four layers are gated linear attention"),
        ({"model_type": "gemma4"}, "'gemma4' is not supported: it has embeddings for each layer"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3' is not supported: it reads images too"),
        ({"model_type": "ministral3"}, "'ministral3' is not supported: its queries are scaled by their position"),
        ({"model_type": "bert"}, "'bert' is not supported (gpt2, llama, mistral, qwen2,"),
        ({"model_type": "olmo3", "rope_parameters": {**YARN, "rope_theta": 5e5}},
         "rope_parameters: must hold 'full_attention' and 'sliding_attention'"),
        ({"model_type": "olmo3", "rope_theta": 1e4}, "rope_theta: 10000.0 is not supported (500000.0)"),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
         "rope_parameters.sliding_attention: 'linear' is not supported (default)"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention: true is not"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0 must be finite and > 0"),
        ({"model_type": "gemma2", "hidden_activation": "x"}, "hidden_activation: 'x' is not known"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "layer_types: must be 26 of"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers: must be 36 of 0 and 1"),
        ({"model_type": "granite", "logits_scaling": 0.0}, "logits_scaling: 0.0 must be finite and > 0"),
        ({"model_type": "starcoder2", "norm_epsilon": 0.0}, "norm_epsilon: 0.0 must be finite and > 0"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.01}, "partial_rotary_factor: 0 of 96 must be even and >= 2"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
         "rope_scaling.short_factor: must be a list of 48 finite numbers > 0"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "rope type 'dynamic' is not supported: its frequencies depend on the length of each call"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
         "rope_scaling.truncate: false is not supported"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: None must be a finite"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": [1]}},
         "rope_scaling.beta_fast: [1] must be a finite number > 0"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 10**30}}, "must be a finite number > 0"),
        ({"model_type": "qwen2", "rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}},
         "rope_theta: 1 turns every pair alike"),
        ({"model_type": "phi3", "original_max_position_embeddings": 1,
          "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
         "rope_scaling.original_max_position_embeddings: must be > 1"),
        ({"model_type": "phi", "partial_rotary_factor": 2.0}, "partial_rotary_factor: 2.0 must be in (0, 1]"),
        ({"model_type": "gpt_neox", "rotary_pct": 1e308}, "rotary_pct: 1e+308 must be in (0, 1]"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}},
         "rope_parameters: must hold objects"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(config, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        read_config(tmp_path / "config.json")
    assert says in str(error.value)


def test_longrope_is_refused_beyond_the_context_of_pretraining():
    """Beyond it transformers switches to other frequencies than those of the cached keys."""
    model = rich_model("phi3")
    assert model.config.context == 32
    with torch.no_grad():
        assert model(rows(length=32)).isfinite().all()
        model(rows(length=40), documents=torch.tensor([[0] * 20 + [1] * 20] * 2))  # packed: no position is beyond
        with pytest.raises(InputError, match="position 32, but this model has original_max_position_embeddings=32"):
            model(rows(length=33))


def test_pythia_files_call_the_head_embed_out_and_hold_masks(tmp_path):
    ours, _ = both("gpt_neox", draw("gpt_neox", 0) | {"tie_word_embeddings": False}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = next(name for name in tensors if name in ("embed_out.weight", "lm_head.weight"))
    tensors["embed_out.weight"] = tensors.pop(head)
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(rows()), ours(rows()))


def test_docs_have_the_tables(pytestconfig):
    """docs/models.md names every family with its LoRA targets, every refusal with its reason, and REAL."""
    text = (pytestconfig.rootpath / "docs" / "models.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    of = {cells[0]: cells for cells in lines}
    for name, family in FAMILIES.items():
        assert of[f"`{name}`"][2].removesuffix(" (ours)") == ", ".join(f"`{t}`" for t in family.default_targets["lora"])
    for name, reason in REFUSED.items():
        assert any(f"`{name}`" in cells[0] and cells[1] == reason for cells in lines), name
    for name, (config, millions) in REAL.items():
        assert of[name] == [name, f"`{config['model_type']}`", f"{millions:,} M"]
