"""torch.compile: forward, loss and gradients in one graph (fullgraph=True), equal to the eager ones to rounding.

`MINIPEFT_COMPILE=all` tries each method on every family.
"""

import os

import pytest
import torch
from torch import nn

from minipeft.adapters import FullConfig, IA3Config, LoRAConfig, PrefixConfig, PromptConfig, add_adapter
from minipeft.data.packing import Batch
from minipeft.models import FAMILIES
from minipeft.training.loop import TrainConfig, train

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": None}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 96, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
METHODS = {
    "lora": LoRAConfig(4, targets="default"),
    "ia3": IA3Config(),
    "prefix": PrefixConfig(3, init="peft"),
    "prompt": PromptConfig(3, init="vocab"),
}
VARIANTS = {
    "dora": LoRAConfig(4, dora=True, targets="default"),
    "pissa": LoRAConfig(4, init="pissa", targets="default"),
    "parts": LoRAConfig(2, targets=("q_proj", "embed_tokens", "lm_head"), modules_to_save=("norm",)),
    "rows": LoRAConfig(2, targets="default", trainable_token_indices=(1, 2)),
    "full": FullConfig(),
}
CASES = [(family, config) for family in ("llama", "gpt2") for config in METHODS.values()]
CASES += [("llama", config) for config in VARIANTS.values()]
CASES += [(family, METHODS["lora"]) for family in ("gemma3_text", "phi")]
if os.environ.get("MINIPEFT_COMPILE") == "all":
    CASES = [(family, config) for family in FAMILIES for config in METHODS.values()]


def make(family, config):
    torch.manual_seed(0)
    given = GPT2 if family == "gpt2" else SHAPE | ({"num_key_value_heads": None} if family == "gpt_neox" else {})
    model = FAMILIES[family].decoder(FAMILIES[family].config(**given))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.25)
        add_adapter(model, config)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model


def rows():
    """Two rows, the second of two documents and padding."""
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros_like(ids)
    documents[1, 6:], documents[1, 13:] = 1, -1
    labels = torch.where(documents < 0, -100, ids)
    labels[1, 6] = -100
    return ids, labels, documents


def gradients(model: nn.Module):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("family", "config"), CASES, ids=[f"{f}-{type(c).__name__}" for f, c in CASES])
def test_a_packed_step_is_one_graph_and_the_same(family, config, apart):
    torch.compiler.reset()
    model, given = make(family, config), rows()
    wanted = model.loss(*given)
    wanted.backward()
    gradient = gradients(model)
    loss = torch.compile(model.loss, fullgraph=True, backend="eager")(*given)
    loss.backward()
    assert abs(loss - wanted) <= 1e-5 * wanted
    compiled = gradients(model)
    assert compiled.keys() == gradient.keys()
    assert all(apart(compiled[name], gradient[name]) <= 1e-4 for name in gradient)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_forward_is_one_graph(method, apart):
    torch.compiler.reset()
    model, (ids, _, documents) = make("llama", METHODS[method]).eval(), rows()
    with torch.no_grad():
        for given in ((ids,), (ids, documents)):
            assert apart(torch.compile(model, fullgraph=True, backend="eager")(*given), model(*given)) <= 1e-5


def test_train_takes_a_compiled_loss(apart):
    """The loop calls model.loss: a compiled one makes the same steps; with dropout other masks are drawn."""
    ends = []
    for dropout in (0.0, 0.1):
        for compiled in (False, True):
            torch.compiler.reset()
            model = make("llama", LoRAConfig(4, dropout=dropout, targets="default"))
            if compiled:
                model.loss = torch.compile(model.loss, fullgraph=True, backend="eager")
            batch = Batch(*rows())
            *_, last = train(model, [batch] * 3, TrainConfig(3, learning_rate=1e-2))
            ends.append(last.loss)
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    assert ends[3] != ends[2]
    assert ends[3] == pytest.approx(ends[2], rel=0.2)
