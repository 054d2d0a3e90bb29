"""Prefix and prompt: virtual tokens are correct under recomputation, padding, packing and the cache."""

from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from minipeft import PrefixConfig, PromptConfig, add_adapter, generate, load_adapter, load_model, save_adapter
from minipeft.generation import GenerateConfig
from tests.museum.twins import Twins

TEXT = "abracadabra"


def with_prefix(both: Twins, tokenizer: object, folder: Path, stir: object, **given: object) -> nn.Module:
    """Our model with a text prefix, and PEFT's with the same one through the files."""
    add_adapter(both.ours, PrefixConfig(5, text=TEXT, windowed=True, **given), tokenizer)
    stir(both.ours)
    save_adapter(both.ours, folder)
    return peft.PeftModel.from_pretrained(both.theirs, folder).eval()


def test_a_prefix_and_activation_checkpointing(exhibit, twins, tokenizer, stir, batch, tmp_path):
    """huggingface/peft#869, huggingface/peft#2191: prefix-tuning fails under activation checkpointing, deep in the
    attention."""
    both = twins()
    theirs = with_prefix(both, tokenizer, tmp_path / "adapter", stir)
    gradients = []
    for checkpointing in (False, True):
        both.ours.train()
        both.ours.activation_checkpointing = checkpointing
        both.ours.zero_grad()
        both.ours.loss(batch.ids, batch.labels, batch.documents).backward()
        gradients.append([p.grad.clone() for p in both.ours.parameters() if p.requires_grad])
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert all(map(torch.equal, *gradients))
    with exhibit.theirs("peft", failure="must match the size", refusal="checkpointing") as peer:
        theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
        theirs.train()
        theirs.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        theirs(batch.ids, labels=batch.labels).loss.backward()
        peer.right = bool(theirs.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0)


def padded_left(ids: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """One row with padding before it, and its attention mask."""
    return torch.cat([torch.zeros_like(ids[:1, :pads]), ids[:1]], 1), torch.tensor([[0] * pads + [1] * ids.shape[1]])


def test_left_padding_behind_a_prompt(exhibit, twins, tokenizer, stir, ids, apart, tmp_path):
    """huggingface/peft#1093, huggingface/peft#1212, huggingface/peft#54: with left padding, the padding stands between
    a soft prompt and its text, whose positions it shifts."""
    both = twins("gpt2")
    add_adapter(both.ours, PromptConfig(5, text=TEXT), tokenizer)
    stir(both.ours)
    save_adapter(both.ours, tmp_path / "adapter")
    row, mask = padded_left(ids, 9)
    with torch.no_grad():
        assert apart(both.ours(row, mask - 1)[:, 9:], both.ours(ids[:1])) < 1e-5
    with exhibit.theirs("peft", warning="position") as peer, torch.no_grad():
        model = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
        alone = model(ids[:1], attention_mask=torch.ones_like(ids[:1])).logits[:, -24:]
        peer.right = apart(model(row, attention_mask=mask).logits[:, -24:], alone) < 1e-4


def test_left_padding_and_learned_positions(exhibit, twins, ids, apart):
    """tloen/alpaca-lora#315: a left-padded row is trained on with positions that count the padding."""
    both = twins("gpt2")
    row, mask = padded_left(ids, 9)
    with torch.no_grad():
        alone = both.theirs(ids[:1]).logits
        assert apart(both.ours(row, mask - 1)[:, 9:], alone) < 1e-5
    with exhibit.theirs("transformers", warning="position") as peer, torch.no_grad():
        peer.right = apart(both.theirs(row, attention_mask=mask).logits[:, 9:], alone) < 1e-4


def test_generation_with_a_prefix(exhibit, twins, tokenizer, stir, tmp_path):
    """huggingface/peft#222, huggingface/peft#2131: generation with a prefix fails, or uses wrong positions, from the
    second token on."""
    both = twins("gpt2")
    theirs = with_prefix(both, tokenizer, tmp_path / "adapter", stir)
    prompts = ["abc", "a longer prompt"]
    greedy = GenerateConfig(max_new_tokens=8, temperature=0)
    found = generate(both.ours, tokenizer, prompts, greedy)
    for prompt, text in zip(prompts, found):  # without a cache
        ids = tokenizer.encode(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(both.ours(torch.tensor([ids]))[0, -1].argmax().item())
        assert tokenizer.decode(ids)[len(prompt) :] == text
    with exhibit.theirs("peft", failure="size|shape|expand") as peer:
        given = torch.tensor([tokenizer.encode("abc")])
        mask = torch.ones_like(given)
        made = theirs.generate(input_ids=given, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)[
            0, 3:
        ]
        peer.right = tokenizer.decode(made.tolist()) == found[0]


def test_heads_of_a_width_of_their_own(exhibit, twins, tokenizer, stir, ids, apart, tmp_path):
    """huggingface/peft#2881, huggingface/peft#1901, adapter-hub/adapters#825: prefix-tuning takes the head width for
    hidden size over heads, and fails on grouped queries or on Qwen3."""
    both = twins("qwen3", head_dim=16)
    add_adapter(both.ours, PrefixConfig(5, text=TEXT, windowed=True), tokenizer)
    stir(both.ours)
    save_adapter(both.ours, tmp_path / "adapter")
    again = load_model(both.folder)
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        found = both.ours(ids)
        assert torch.equal(again(ids), found)
    with exhibit.theirs("peft", failure="size|shape") as peer, torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
        peer.right = apart(theirs(ids).logits, found) < 1e-4


def test_the_mask_counts_the_prefix(exhibit, twins, tokenizer, stir, ids, apart, tmp_path):
    """zai-org/ChatGLM3#359, huggingface/transformers#41696: the attention mask of a row does not count its prefix."""
    both = twins()
    theirs = with_prefix(both, tokenizer, tmp_path / "adapter", stir)
    row = torch.cat([ids[:1], torch.zeros_like(ids[:1, :9])], 1)
    mask = torch.tensor([[1] * 24 + [0] * 9])
    documents = torch.tensor([[0] * 10 + [1] * 14])
    with torch.no_grad():
        alone = both.ours(ids[:1])
        assert apart(both.ours(row, mask - 1)[:, :24], alone) < 1e-5
        assert apart(both.ours(ids[:1], documents)[:, 10:], both.ours(ids[:1, 10:])) < 1e-5
    with exhibit.theirs("peft", failure="size|shape") as peer, torch.no_grad():
        peer.right = apart(theirs(row, attention_mask=mask).logits[:, :24], alone) < 1e-4
