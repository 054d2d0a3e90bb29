"""Adding, training, removing and merging each adapter: counts, trained tensors, and that nothing else changes."""

import copy
import gc
import math

import pytest
import torch

import minipeft
from minipeft.adapters import (
    FullConfig,
    IA3Config,
    LNTuningConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    VeRAConfig,
    add_adapter,
    remove_adapter,
)
from minipeft.adapters.lora import LoRALinear, find_lora_layers
from minipeft.errors import InputError
from minipeft.models import FAMILIES
from minipeft.training.loop import TrainConfig, train

LINEARS = {
    "lora": LoRAConfig(rank=4, alpha=8.0),
    "rslora": LoRAConfig(rank=4, alpha=8.0, rslora=True),
    "dora": LoRAConfig(rank=4, alpha=8.0, dora=True),
    "pissa": LoRAConfig(rank=4, alpha=8.0, init="pissa"),
    "lora_bias": LoRAConfig(rank=4, alpha=8.0, lora_bias=True),
    "gaussian": LoRAConfig(rank=4, alpha=8.0, init="gaussian", targets="default"),
    "vera": VeRAConfig(rank=8, targets="all-linear"),
    "ia3": IA3Config(),
    "ln_tuning": LNTuningConfig(),
}
EVERY = {
    **LINEARS,
    "prefix": PrefixConfig(3, init="peft"),
    "prompt": PromptConfig(3, init="vocab"),
    "full": FullConfig(),
}

GPT2_SIZES = {  # vocabulary, width, layers
    "gpt2": (50257, 768, 12),
    "codegpt-small": (50001, 768, 12),
    "codegpt-adapted": (50260, 768, 12),
    "gpt2-medium": (50257, 1024, 24),
    "gpt2-large": (50257, 1280, 36),
    "gpt2-xl": (50257, 1600, 48),
}
SMALL = (2_359_296, 589_824, 368_640, 15_360)
PAPER = {  # the base; LoRA r 16 on all linears, on the default targets; prefix; prompt (columns: 20)
    "gpt2": (124_439_808, *SMALL),
    "codegpt-small": (124_243_200, *SMALL),
    "codegpt-adapted": (124_442_112, *SMALL),
    "gpt2-medium": (354_823_168, 6_291_456, 1_572_864, 983_040, 20_480),
    "gpt2-large": (774_030_080, 11_796_480, 2_949_120, 1_843_200, 25_600),
    "gpt2-xl": (1_557_611_200, 19_660_800, 4_915_200, 3_072_000, 32_000),
    "codellama-7b": (6_738_546_688, 39_976_960, 8_388_608, 5_242_880, 81_920),
    "mistral-7b": (7_241_732_096, 41_943_040, 6_815_744, 1_310_720, 81_920),
}


def state(model):
    """Every tensor's bytes by name, ties included."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_train_as_many_numbers_as_its_arithmetic_says(name):
    with torch.device("meta"):
        if name in GPT2_SIZES:
            vocabulary, width, layers = GPT2_SIZES[name]
            kind, fields = "gpt2", {"vocab_size": vocabulary, "n_embd": width, "n_layer": layers, "n_head": width // 64}
        else:
            kind = "llama" if name == "codellama-7b" else "mistral"
            fields = {"vocab_size": 32016} if kind == "llama" else {}
        config, module = FAMILIES[kind].config, FAMILIES[kind].decoder
        model = module(config(**fields))
    base = sum(p.numel() for p in model.parameters())
    assert base == PAPER[name][0]
    methods = (LoRAConfig(16), LoRAConfig(16, targets="default"), PrefixConfig(20), PromptConfig(20))
    for method, count in zip(methods, PAPER[name][1:]):
        report = add_adapter(model, method)
        assert (report.trainable, report.total) == (count, base + count)
        assert report.percent == 100 * report.trainable / report.total
        remove_adapter(model)
    assert add_adapter(model, FullConfig()).trainable == base


@pytest.mark.parametrize("config", LINEARS.values(), ids=list(LINEARS))
def test_at_first_no_logit_changes(model, ids, config):
    with torch.no_grad():
        before = model(ids)
        report = add_adapter(model, config)
        change = (model(ids) - before).abs().max().item()
    exact = not (isinstance(config, LoRAConfig) and (config.dora or config.init == "pissa"))
    assert change == 0 if exact else change <= 2e-5 * before.abs().max()
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize("config", EVERY.values(), ids=list(EVERY))
def test_everything_trainable_moves_after_an_evaluation_pass_and_nothing_else(model, packed, config):
    add_adapter(model, config)
    with torch.no_grad():
        model.eval()(packed.ids, packed.documents)
    before = state(model)
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for _ in train(model, [packed] * 3, TrainConfig(3, learning_rate=1e-2)):
        pass
    after = model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == trainable


@pytest.mark.parametrize("config", EVERY.values(), ids=list(EVERY))
def test_remove_leaves_no_trace(model, ids, stir, config):
    before, shown, held = state(model), repr(model), dict(model.named_parameters())
    kinds = [type(m) for m in model.modules()]
    add_adapter(model, config)
    if not isinstance(config, FullConfig):
        assert repr(model) != shown
        stir(model)
    with torch.no_grad():
        model(ids)
    remove_adapter(model)
    assert same(before, model.state_dict())
    assert repr(model) == shown
    assert [type(m) for m in model.modules()] == kinds
    after = dict(model.named_parameters())
    assert list(after) == list(held)
    assert all(after[name] is held[name] and after[name].requires_grad for name in held)
    assert (model.adapter, model.virtual_tokens, model.prompt) == (None, 0, None)


@pytest.mark.parametrize("config", LINEARS.values(), ids=list(LINEARS))
def test_merged_weights_compute_the_same_and_leave_a_plain_model(decoder, family, ids, stir, apart, config):
    biases = {} if family != "llama" else {"attention_bias": True, "mlp_bias": True}
    if family == "mistral" and config is LINEARS["lora_bias"]:
        return  # Mistral has no biases to merge into: the refusal has its own test
    model = decoder(family, **biases)
    shown, names = repr(model), list(model.state_dict())
    add_adapter(model, config)
    stir(model)
    before = state(model)
    with torch.no_grad():
        wanted = model(ids)
        report = minipeft.merge_adapter(model)
        assert apart(model(ids), wanted) <= 2e-5
    assert repr(model) == shown
    assert list(model.state_dict()) == names
    changes = [(t - before[name]).abs().max().item() for name, t in model.state_dict().items()]
    assert report.largest_change == max(changes) > 0
    assert 0 <= report.relative_error < 1e-6


def test_a_bias_that_the_base_does_not_have_is_not_merged(decoder, stir):
    model = decoder("mistral")
    add_adapter(model, LoRAConfig(lora_bias=True))
    before = state(stir(model))
    with pytest.raises(InputError, match="the adapter has a bias and the base has none"):
        minipeft.merge_adapter(model)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_merge_that_is_not_finite_touches_nothing(model, bad):
    add_adapter(model, LoRAConfig(rank=2))
    last = list(find_lora_layers(model).values())[-1]
    with torch.no_grad():
        last.lora_B.fill_(bad)
        last.lora_A.fill_(10)
    before = state(model)
    with pytest.raises(InputError, match="merged weight would not be finite"):
        minipeft.merge_adapter(model)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


def test_a_merge_into_a_tied_weight_is_refused_before_anything_is_touched(model, stir):
    first, second = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][0:8:7]  # one place in two blocks
    if first.weight.shape != second.weight.shape:
        first, second = (list(model.blocks[i].modules()) for i in (0, 1))
        first, second = (next(m for m in side if isinstance(m, torch.nn.Linear)) for side in (first, second))
    second.weight = first.weight
    add_adapter(model, LoRAConfig(rank=2))
    before = state(stir(model))
    with pytest.raises(InputError, match=r"cannot merge into '.*': its weight is also \['.*'\]\. Untie it first"):
        minipeft.merge_adapter(model)
    assert same(before, model.state_dict())


def test_ties_survive_everything(decoder, family, ids):
    model = decoder(family, tie_word_embeddings=True)
    tied = lambda m: m.lm_head.weight is m.embedding.weight
    add_adapter(model, LoRAConfig(rank=2))
    assert tied(model)
    assert tied(copy.deepcopy(model))
    assert tied(model.to(torch.bfloat16))
    minipeft.merge_adapter(model)
    assert tied(model)


@pytest.mark.parametrize("config", LINEARS.values(), ids=list(LINEARS))
def test_the_adapter_stays_float32_to_the_bit_through_casts(model, ids, stir, config):
    add_adapter(model, config)
    stir(model)
    kept = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.double, lambda: model.to(torch.bfloat16)):
        cast()
        held = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert same(kept, held)
        assert all(p.dtype == torch.float32 for p in held.values())
    logits = model(ids)
    assert model.embedding.weight.dtype == logits.dtype == torch.bfloat16
    logits.float().logsumexp(dim=-1).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in held.values())


@pytest.mark.parametrize("config", LINEARS.values(), ids=list(LINEARS))
def test_a_deep_copy_is_equal_and_shares_nothing(model, ids, stir, config):
    add_adapter(model, config)
    stir(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(ids), model(ids))
        mine = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
        assert not mine & {t.data_ptr() for t in [*twin.parameters(), *twin.buffers()]}
        before = model(ids)
        stir(twin)
        assert torch.equal(model(ids), before)
    remove_adapter(twin)
    assert repr(model) != repr(twin)


def test_fifty_rounds_leak_no_tensor(model, ids):
    def round_trip():
        for config in (*LINEARS.values(), EVERY["prefix"], EVERY["prompt"]):
            add_adapter(model, config)
            with torch.no_grad():
                model(ids)
            remove_adapter(model)

    def alive():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))

    round_trip()
    before = alive()
    for _ in range(50 // 9 + 1):
        round_trip()
    assert alive() == before


def test_a_plain_linear_takes_the_adapters_place_even_when_the_model_was_loaded_again(model):
    add_adapter(model, LoRAConfig(rank=2))
    fresh = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(fresh, assign=True)
    remove_adapter(model)
    assert all(torch.equal(t, fresh[name]) for name, t in model.state_dict().items())


def test_a_second_adapter_is_refused_with_what_to_do(model):
    for first in EVERY.values():
        add_adapter(model, first)
        with pytest.raises(InputError, match=r"already\. remove_adapter or merge_adapter first"):
            add_adapter(model, LoRAConfig(rank=2))
        remove_adapter(model)


def test_what_cannot_be_merged_or_removed_is_said(model):
    with pytest.raises(InputError, match="the model holds no adapter"):
        remove_adapter(model)
    with pytest.raises(InputError, match="holds no adapter; only LoRA"):
        minipeft.merge_adapter(model)
    add_adapter(model, PrefixConfig(2, init="peft"))
    with pytest.raises(InputError, match="holds prefix; only LoRA"):
        minipeft.merge_adapter(model)


def test_the_report_is_a_table(model):
    said = str(add_adapter(model, LoRAConfig(rank=2)))
    assert "method     lora" in said
    assert "float32" in said
    assert "backend    reference" in said
    assert f"{len(find_lora_layers(model))} modules" in said


def test_other_things_are_not_configs(model):
    with pytest.raises(InputError, match="dict is not an adapter's config"):
        add_adapter(model, {"rank": 4})


def test_the_seed_decides_the_start(decoder):
    drawn = []
    for seed in (0, 0, 1):
        model = decoder("llama")
        add_adapter(model, LoRAConfig(rank=2), seed=seed)
        drawn.append(next(m for m in model.modules() if isinstance(m, LoRALinear)).lora_A)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


TRAINED = {"vera": VeRAConfig(8, dropout=0.5, targets="all-linear"), "ia3": IA3Config(), "ln_tuning": LNTuningConfig()}


@pytest.mark.parametrize("config", TRAINED.values(), ids=list(TRAINED))
def test_packed_is_separate_and_cached_is_uncached(model, packed, separate, gradients, apart, stir, ids, config):
    """LoRA's, a prefix's and a prompt's are in their own tests."""
    add_adapter(model, config)
    stir(model)
    loss, together = gradients(model, [packed])
    alone, wanted = gradients(model, separate)
    assert loss == pytest.approx(alone, rel=1e-5)
    assert max(apart(together[name], wanted[name]) for name in wanted) <= 2e-5
    with torch.no_grad():
        cache = model.new_cache(2, 30)
        pieces = [model(piece, cache=cache) for piece in ids.split([9, 1, 1, 1, 18], dim=1)]
        assert apart(torch.cat(pieces, dim=1), model(ids)) <= 1e-5


@pytest.mark.parametrize("config", TRAINED.values(), ids=list(TRAINED))
def test_checkpointed_activations_give_the_same_bits(model, packed, gradients, stir, config):
    """Dropout's included, which another seed changes."""
    add_adapter(model, config)
    stir(model).train()
    found = []
    for seed, model.activation_checkpointing in ((11, False), (11, True), (12, True)):
        torch.manual_seed(seed)
        found.append(gradients(model, [packed]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items())
    assert (found[2][0] != found[0][0]) == (config == TRAINED["vera"])


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_full_tuning_packed_is_separate(model, packed, separate, gradients, apart, activation_checkpointing):
    add_adapter(model, FullConfig())
    model.train()
    model.activation_checkpointing = activation_checkpointing
    loss, packed_gradients = gradients(model, [packed])
    alone, wanted = gradients(model, separate)
    assert loss == pytest.approx(alone, rel=1e-5)
    assert all(apart(packed_gradients[name], wanted[name]) <= 2e-5 for name in wanted)
