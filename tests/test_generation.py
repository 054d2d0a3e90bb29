"""Generation: equal with and without the cache, in a batch and alone, and to transformers token by token."""

from functools import partial

import pytest
import torch
import transformers

import minipeft
from minipeft.decoding import pad_left
from minipeft.errors import InputError
from minipeft.generation import GenerateConfig, answer, generate, stream
from minipeft.models import FAMILIES, GPT2, GPT2Config, Llama, LlamaConfig, Mistral, MistralConfig
from minipeft.models.checkpoint import load_model, make_config_json, save_model
from minipeft.models.config import parse_config

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 60, "initializer_range": 0.25}  # fmt: skip
FEW = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "initializer_range": 0.25}
WINDOWS = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 8}


def make(name):
    """A small decoder of the family, with windows where it has them."""
    config = parse_config(FAMILIES[name].config, {**SIZES, **WINDOWS})
    return FAMILIES[name].decoder(config)


MAKERS = {name: partial(make, name) for name in FAMILIES} | {
    "gpt2": lambda: GPT2(GPT2Config(**FEW)),
    "llama": lambda: Llama(LlamaConfig(**SIZES)),
    "mistral": lambda: Mistral(MistralConfig(**SIZES, sliding_window=6)),
}
ADAPTERS = {
    "none": None,
    "lora": minipeft.LoRAConfig(rank=4, alpha=8),
    "prefix": minipeft.PrefixConfig(length=5, init="peft"),
    "prompt": minipeft.PromptConfig(length=5, init="normal"),
}


class Letters:
    """A tokenizer of one id per letter: `a` is 3."""

    eos, bos, pad = 2, None, None

    def encode_all(self, texts):
        return [[ord(sign) - 94 for sign in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(i + 94) for i in ids)


PROMPTS = ["bcdefghij" * 2, "q", "hello", "abcdabcda"]


def every(**given):
    """All answers of a small GPT-2."""
    return list(answer(MAKERS["gpt2"](), Letters(), PROMPTS, **{"config": GenerateConfig(2), **given}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"config": {"max_new_tokens": 2}}, "config: {'max_new_tokens': 2} must be a GenerateConfig"),
        ({"only": 1}, "only: 1 must be a list of numbers"),
        ({"only": [0.0]}, "only: 0.0 must be an integer in [0, 4)"),
        ({"only": [-1]}, "only: -1 must be an integer in [0, 4)"),
        ({"only": [4]}, "only: 4 must be an integer in [0, 4)"),
        ({"adapters": ["a"] * 4}, "adapters: the model holds no bank of adapters. bank = AdapterBank(model)"),
    ],
)
def test_arguments_are_checked_before_any_answer(given, said):
    with pytest.raises(InputError) as error:
        every(**given)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("abcd", "adapters: must be a list of 4 names, one for each prompt"),
        (["a"] * 3, "adapters: must be a list of 4 names, one for each prompt"),
        (4, "adapters: 4 must be a list of names"),
        (["a", None, "b", "a"], "adapters: the bank does not hold 'a' (it holds: nothing)"),
    ],
)
def test_the_names_of_a_bank_are_checked_before_any_answer(names, said):
    model = MAKERS["gpt2"]()
    minipeft.AdapterBank(model)
    with pytest.raises(InputError) as error:
        answer(model, Letters(), PROMPTS, GenerateConfig(2), adapters=names)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "prompt: has no tokens"),
        ([1, 500], "prompt: has id 500, but the model has 60 tokens. The tokenizer belongs to another model"),
        (
            [1] * 95,
            "prompt: 95 tokens and 2 new ones exceed the context, 96. Cut it to 94 tokens or lower max_new_tokens",
        ),
    ],
)
def test_a_streamed_prompt_is_checked_as_an_answered_one(prompt, said):
    with pytest.raises(InputError) as error:
        "".join(stream(MAKERS["gpt2"](), Letters(), prompt, GenerateConfig(2)))
    assert str(error.value) == said


@pytest.fixture(params=MAKERS)
def family(request):
    return request.param


def tuned(family, adapter, seed=0):
    """A random decoder with an adapter away from its init."""
    model = MAKERS[family]()
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    if ADAPTERS[adapter] is not None:
        minipeft.add_adapter(model, ADAPTERS[adapter], seed=seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def plain_greedy(model, row, new):
    """The definition: run the whole text again for each token, alone, without a cache."""
    model.eval()
    made = []
    with torch.no_grad():
        for _ in range(new):
            token = int(model(torch.tensor([row + made]))[0, -1].argmax())
            if token == Letters.eos:
                break
            made.append(token)
    return made


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_in_a_padded_batch_is_greedy_alone_without_a_cache(family, adapter):
    model = tuned(family, adapter)
    answers = sorted(answer(model, Letters(), PROMPTS, GenerateConfig(24, temperature=0)), key=lambda a: a.index)
    for a, row in zip(answers, Letters().encode_all(PROMPTS)):
        assert a.ids == plain_greedy(model, row, 24)


def test_the_adapter_changes_what_is_said(family):
    said = {name: tuple(generate(tuned(family, name), Letters(), PROMPTS, GenerateConfig(24, 0))) for name in ADAPTERS}
    assert len(set(said.values())) == len(ADAPTERS)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sampling_does_not_depend_on_the_batch(family, adapter):
    model = tuned(family, adapter)
    together = generate(model, Letters(), PROMPTS, GenerateConfig(20, 0.9, 0.9, seed=3))
    alone = generate(model, Letters(), PROMPTS, GenerateConfig(20, 0.9, 0.9, seed=3, batch=1))
    assert together == alone
    assert generate(model, Letters(), PROMPTS, GenerateConfig(20, 0.9, 0.9, seed=4)) != together


def test_only_some_prompts_get_what_they_would_have_got(family):
    model = tuned(family, "none")
    config = GenerateConfig(12, 0.9, 0.9)
    every = {a.index: a for a in answer(model, Letters(), PROMPTS, config)}
    assert {a.index: a for a in answer(model, Letters(), PROMPTS, config, only=[1, 3])} == {i: every[i] for i in (1, 3)}


def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    model = tuned(family, "none")
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, documents = pad_left(Letters().encode_all(PROMPTS), 0)
    theirs = peer.generate(
        ids, attention_mask=(documents >= 0).long(), do_sample=False, max_new_tokens=64, eos_token_id=2, pad_token_id=0
    )[:, ids.shape[1] :]
    answers = sorted(answer(model, Letters(), PROMPTS, GenerateConfig(64, temperature=0)), key=lambda a: a.index)
    for a, row in zip(answers, theirs.tolist()):
        assert a.ids == (row[: row.index(2)] if 2 in row else row)


def test_greedy_tokens_of_real_checkpoints_are_those_of_transformers(assets, real_model):
    for folder, prompt, new in (
        (assets / "fixtures/stories260K", "Once upon a time", 64),
        (real_model, "def fibonacci(n):", 64),
    ):
        tokenizer, model = minipeft.load_tokenizer(folder), load_model(folder, dtype=torch.float32)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.tensor([tokenizer.encode(prompt)])
        theirs = peer.generate(ids, do_sample=False, max_new_tokens=new)[0, ids.shape[1] :].tolist()
        made = next(answer(model, tokenizer, [prompt], GenerateConfig(new, temperature=0))).ids
        assert made == [token for token in theirs if token != tokenizer.eos]


def test_the_sorter_sorts(assets):
    """gpt-nano-sort has 11 positions: six letters in, the same sorted out; the first token comes with the prompt."""
    model = load_model(assets / "fixtures/gpt-nano-sort")

    class Abc(Letters):
        eos = None

        def encode_all(self, texts):
            return [["ABC".index(sign) for sign in text] for text in texts]

        def decode(self, ids):
            return "".join("ABC"[i] for i in ids)

    prompts = ["CBAABC"[i:] + "CBAABC"[:i] for i in range(6)]
    assert generate(model, Abc(), prompts, GenerateConfig(5, temperature=0)) == ["AABBC"] * 6


def test_ends_at_eos_at_a_stop_text_and_at_the_limit():
    model = tuned("llama", "none")
    whole = plain_greedy(model, [5, 6, 7], 40)
    text = Letters().decode(whole)
    stop = text[3:5]
    ends = {
        a.ended: a for a in answer(model, Letters(), [Letters().decode([5, 6, 7])], GenerateConfig(3, temperature=0))
    }
    assert ends["limit"].ids == whole[:3]
    cut = next(answer(model, Letters(), [Letters().decode([5, 6, 7])], GenerateConfig(40, 0, stop=(stop,))))
    assert cut.ended == "stop"
    assert cut.text == text[: text.index(stop)]

    class EndsEarly(Letters):
        eos = whole[4]

    early = next(answer(model, EndsEarly(), [Letters().decode([5, 6, 7])], GenerateConfig(40, temperature=0)))
    assert (early.ended, early.ids) == ("eos", whole[: whole.index(whole[4])])


def test_several_end_tokens_in_the_config_are_honoured():
    model = tuned("llama", "none")
    whole = plain_greedy(model, [5, 6, 7], 40)
    config = make_config_json(model.config, torch.float32) | {"eos_token_id": [1, whole[2]]}
    fields = {name: config[name] for name in ("eos_token_id",)}
    model.config = type(model.config)(**{**SIZES, **fields})
    made = next(answer(model, Letters(), [Letters().decode([5, 6, 7])], GenerateConfig(40, temperature=0)))
    assert made.ids == whole[: whole.index(whole[2])]


def test_a_mode_and_an_adapter_survive():
    model = tuned("gpt2", "prefix").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    generate(model, Letters(), PROMPTS, GenerateConfig(4))
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be an integer >= 1"),
        ({"temperature": -1.0}, "temperature: -1.0 must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature: nan must be finite and >= 0"),
        ({"top_p": 0.0}, "top_p: 0.0 must be in (0, 1]"),
        ({"top_p": 1.5}, "top_p: 1.5 must be in (0, 1]"),
        ({"seed": -1}, "seed: -1 must be an integer in [0, 2^63)"),
        ({"batch": True}, "batch: True must be an integer >= 1"),
        ({"stop": ("",)}, "stop: a stop text is empty"),
    ],
)
def test_wrong_settings_say_so(config, said):
    with pytest.raises(InputError) as error:
        GenerateConfig(**config)
    assert str(error.value) == said


def test_a_prompt_that_does_not_fit_is_refused_before_any_is_answered():
    model = tuned("gpt2", "prefix")
    with pytest.raises(InputError) as error:
        generate(model, Letters(), ["ab", "a" * 90], GenerateConfig(8))
    assert str(error.value) == (
        "prompt 2: 90 tokens and 8 new ones exceed the context, 96 (of which 5 are virtual tokens). "
        "Cut it to 83 tokens or lower max_new_tokens"
    )
    with pytest.raises(InputError, match="prompt 1: has no tokens"):
        generate(model, Letters(), [""], GenerateConfig(8))


def test_every_family_is_here():
    assert set(MAKERS) == set(FAMILIES)


def test_one_text_is_no_list_of_prompts():
    """Each letter would be answered as a prompt."""
    with pytest.raises(InputError, match="prompts: 'hello' must be a list of texts"):
        generate(MAKERS["gpt2"](), Letters(), "hello")


def test_the_mode_is_put_back_when_generation_fails():
    model = MAKERS["gpt2"]().train()
    model.hidden = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(model, Letters(), ["hello"], GenerateConfig(4))
    assert model.training
