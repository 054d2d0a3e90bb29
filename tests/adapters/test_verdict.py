"""The report on a merge, against plain torch and `generate`: KL, top-1 tokens, greedy answers; its warnings."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import minipeft
from minipeft.adapters import FULL, IA3Config, LNTuningConfig, LoRAConfig, PrefixConfig, VeRAConfig, add_adapter
from minipeft.adapters.lora import find_lora_layers
from minipeft.adapters.verdict import MergeReport
from minipeft.errors import InputError
from minipeft.generation import GenerateConfig, answer

NEW = 4
PROMPTS = ["abcd", "bbb", "the end of it", "x"]


class Letters:
    """A letter is a token; 7 is EOS."""

    eos = 7
    pad = bos = None

    def encode(self, text):
        return [ord(letter) % 61 for letter in text]

    def encode_all(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids, **_):
        return "".join(chr(97 + number) for number in ids)


METHODS = {
    "lora": LoRAConfig(rank=4),
    "dora": LoRAConfig(rank=4, dora=True),
    "pissa": LoRAConfig(rank=4, init="pissa"),
    "ia3": IA3Config(),
    "vera": VeRAConfig(rank=8),
    "ln_tuning": LNTuningConfig(),
}


def greedy(model, prompts):
    """Answers by generation.py, which pads and shares a cache."""
    settings = GenerateConfig(max_new_tokens=NEW, temperature=0.0)
    found = sorted(answer(model, Letters(), prompts, settings), key=lambda a: a.index)
    return [a.ids for a in found]


def measured(unmerged, merged):
    """KL of each token, and how many top-1 tokens and answers differ, in one pass over whole logits."""
    answers, kl, tokens = greedy(unmerged, PROMPTS), [], 0
    for prompt, made in zip(PROMPTS, answers):
        ids = torch.tensor([Letters().encode(prompt) + made])
        with torch.no_grad():
            p, q = unmerged(ids)[0].double(), merged(ids)[0].double()
        kl.append(F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1))
        tokens += int((p.argmax(-1) != q.argmax(-1)).sum())
    changed = sum(a != b for a, b in zip(answers, greedy(merged, PROMPTS)))
    return torch.cat(kl), tokens, changed


CASES = [(method, ("float32", None)) for method in METHODS]
CASES += [("lora", dtypes) for dtypes in (("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32"))]


@pytest.mark.parametrize(("method", "dtypes"), CASES)
def test_the_report_is_what_plain_torch_and_generate_see(decoder, stir, method, dtypes):
    own, wanted = (None if name is None else getattr(torch, name) for name in dtypes)
    model = decoder("llama", tie_word_embeddings=method == "lora").to(own)
    add_adapter(model, METHODS[method])
    stir(model, scale=0.05).train()
    unmerged = copy.deepcopy(model).eval()
    report = minipeft.merge_adapter(model, check=PROMPTS, tokenizer=Letters(), new_tokens=NEW, dtype=wanted)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {wanted or own}
    kl, tokens, answers = measured(unmerged, model.eval())
    assert (report.prompts, report.tokens) == (len(PROMPTS), len(kl))
    near = {"rel": 1e-3, "abs": 1e-9} if report.mean_kl < 1e-6 else {"rel": 0.05}  # bf16 products differ by batch
    assert report.mean_kl == pytest.approx(kl.mean().item(), **near)
    assert report.max_kl == pytest.approx(kl.max().item(), **near)
    assert (report.changed_tokens, report.changed_answers) == (tokens, answers)
    if own == torch.float32 and wanted is None:
        assert report.max_kl < 1e-9
        assert report.warnings == ()
    elif own == torch.float32 or wanted is None:
        assert report.mean_kl > 1e-6  # rounding is seen


def test_a_change_of_the_model_is_seen_and_warned_of(decoder, stir, monkeypatch):
    """A wrong merge: twice the update of every weight."""
    model = decoder("gpt2")
    add_adapter(model, LoRAConfig(rank=4))
    stir(model)
    kind = type(next(iter(find_lora_layers(model).values())))
    right = kind.merged
    wrong = lambda self: (2 * right(self)[0] - self.weight, right(self)[1])
    monkeypatch.setattr(kind, "merged", wrong)
    report = minipeft.merge_adapter(model, check=PROMPTS, tokenizer=Letters(), new_tokens=NEW)
    assert report.relative_error < 1e-6  # which this cannot show
    assert report.mean_kl > 1e-2
    assert report.changed_answers > 0
    assert report.warnings == (
        f"merging changes {100 * report.changed_tokens / report.tokens:.2g} % of the top-1 tokens "
        f"({report.changed_tokens} of {report.tokens})",
        f"merging changes {report.changed_answers} of 4 greedy answers",
    )
    assert str(report).splitlines()[-2:] == [f"warning    {text}" for text in report.warnings]


@pytest.mark.parametrize(("changed", "warned"), [(0, False), (1, False), (2, True)])
def test_from_a_thousandth_of_the_tokens_on_a_change_is_warned_of(changed, warned):
    report = MergeReport(3, 0.1, 0.01, 8, 1500, 1e-4, 1e-2, changed, 0)
    assert bool(report.warnings) == warned
    assert ("warning" in str(report)) == warned
    assert f"{changed} of 1,500 tokens changed" in str(report)


def test_logits_that_are_not_finite_are_warned_of():
    report = MergeReport(3, 0.1, 0.01, 8, 1500, float("nan"), float("nan"), 0, 0)
    assert report.warnings == ("the merged model's logits are not finite",)


def test_without_prompts_the_report_says_that_nothing_was_compared(model, stir):
    add_adapter(model, LoRAConfig(rank=2))
    report = minipeft.merge_adapter(stir(model))
    assert report.prompts is None
    assert "answers    not compared: no prompts were given" in str(report)


REFUSED = {
    "no prompts": ({"check": []}, r"check: \[\] must be a list of texts"),
    "a text": ({"check": "abc"}, "check: 'abc' must be a list of texts"),
    "no tokenizer": ({"tokenizer": None}, "check: a tokenizer is needed"),
    "empty": ({"check": ["a", ""]}, "prompt 2: has no tokens"),
    "long": ({"check": ["a" * 93]}, "prompt 1: 93 tokens and 4 new ones exceed the context, 96"),
    "no new tokens": ({"new_tokens": 0}, "new_tokens: 0 must be an integer >= 1"),
    "dtype": ({"dtype": torch.float16}, r"dtype: torch\.float16 is not a dtype to merge into"),
    "not finite": ({}, "the merged weight would not be finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_touches_nothing(decoder, stir, case):
    changes, text = REFUSED[case]
    model = decoder("llama").to(torch.bfloat16)
    add_adapter(model, LoRAConfig(rank=2))
    stir(model)
    if case == "not finite":
        with torch.no_grad():
            list(find_lora_layers(model).values())[-1].lora_B.fill_(float("inf"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {"check": PROMPTS, "tokenizer": Letters(), "new_tokens": NEW, "dtype": torch.float32} | changes
    with pytest.raises(InputError, match=text):
        minipeft.merge_adapter(model, **given)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert model.adapter is not None


@pytest.mark.parametrize("config", [FULL.config(), PrefixConfig(length=3, init="normal")], ids=["full", "prefix"])
def test_a_method_that_cannot_be_merged_is_refused_with_prompts_too(model, config):
    add_adapter(model, config, Letters())
    with pytest.raises(InputError, match=r"only .* merge into weights"):
        minipeft.merge_adapter(model, check=PROMPTS, tokenizer=Letters())


PARTS = {
    "LoRA": {"targets": ("q_proj", "lm_head")},
    "whole": {"modules_to_save": ("lm_head",)},
    "rows": {"trainable_token_indices": (1, 2, 3)},
    "embedding": {"targets": ("q_proj", "embed_tokens"), "bias": "all"},
}


@pytest.mark.parametrize("given", PARTS.values(), ids=list(PARTS))
def test_a_merge_of_a_tied_table_is_compared_with_the_unmerged_head(decoder, stir, given):
    model = decoder("llama", tie_word_embeddings=True)
    add_adapter(model, LoRAConfig(4, **{"targets": ("q_proj",), **given}))
    stir(model, scale=0.05)
    unmerged = copy.deepcopy(model).eval()
    report = minipeft.merge_adapter(model, check=PROMPTS, tokenizer=Letters(), new_tokens=NEW)
    kl, tokens, answers = measured(unmerged, model.eval())
    assert report.tokens == len(kl)
    assert report.max_kl < 1e-9
    assert (report.changed_tokens, report.changed_answers) == (tokens, answers) == (0, 0)
    assert model.config.tie_word_embeddings == ("trainable_token_indices" in given)
    assert (model.lm_head.weight is model.embedding.weight) == model.config.tie_word_embeddings


def test_one_merged_weight_at_a_time_stands_in_memory(decoder, monkeypatch):
    model = decoder("llama")
    add_adapter(model, LoRAConfig(rank=2))
    kind = type(next(iter(find_lora_layers(model).values())))
    right, made, alive = kind.merged, [], []

    def merged(self):
        alive.append(sum(ref() is not None for ref in made))
        result = right(self)
        made.append(weakref.ref(result[0]))
        return result

    monkeypatch.setattr(kind, "merged", merged)
    minipeft.merge_adapter(model)
    assert alive == [0] * len(made)


def test_a_tokenizer_without_an_end_is_enough(decoder, stir):
    model = decoder("gpt2")
    add_adapter(model, LoRAConfig(rank=2))
    plain = SimpleNamespace(encode=Letters().encode, eos=None)
    assert minipeft.merge_adapter(stir(model), check=["ab"], tokenizer=plain, new_tokens=3).tokens == 5
