"""Optimizer steps without effect, or with a wrong log."""

import json

import peft
import pytest
import torch
import transformers

from minipeft import (
    FullConfig,
    LoRAConfig,
    PrefixConfig,
    TrainConfig,
    add_adapter,
    generate,
    load_adapter,
    load_model,
    train,
)
from minipeft.adapters.lora import find_lora_layers
from minipeft.adapters.peft_format import save_adapter
from minipeft.generation import GenerateConfig
from minipeft.training.loop import learning_rate_at
from minipeft.training.movement import Movement
from tests.museum.twins import peft_layers


def test_a_loss_that_is_not_a_number(exhibit, twins, batch, tmp_path):
    """huggingface/trl#6702, huggingface/transformers#13619: a NaN loss is replaced by the mean of earlier ones in the
    log, while the weights are corrupted."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(2))
    layer = next(iter(find_lora_layers(both.ours).values()))
    with torch.no_grad():
        layer.lora_A[0, 0] = float("nan")
    with exhibit.refused("step 1: the loss is nan"):
        list(train(both.ours, [batch], TrainConfig(steps=1)))
    with exhibit.theirs("transformers", warning="nan", refusal="nan") as peer:
        with torch.no_grad():
            both.theirs.model.norm.weight[0] = float("nan")
        data = [{"input_ids": row, "labels": row} for row in batch.ids]
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(both.theirs, arguments, train_dataset=data)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        peer.right = trainer.state.log_history[0]["loss"] != trainer.state.log_history[0]["loss"]


def test_the_first_step_is_a_step(exhibit):
    """huggingface/transformers#34754, verl-project/verl#3674, pytorch/torchtitan#1261, google-research/bert#1293: with
    warm-up the learning rate of the first step is 0, and the step is wasted."""
    assert learning_rate_at(0, TrainConfig(steps=100, warmup=0.1, learning_rate=1.0)) == pytest.approx(0.1)
    assert learning_rate_at(99, TrainConfig(steps=100, warmup=0.1, learning_rate=1.0)) > 0
    with exhibit.theirs("transformers") as peer:
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 10, 100)
        peer.right = schedule.get_last_lr()[0] > 0


def test_updates_below_bfloat16(exhibit, twins, batch):
    """meta-pytorch/torchtune#2254, pytorch/ao#1124, huggingface/transformers#21312: in full bfloat16 training, updates
    smaller than the weights' last bit are rounded away."""
    both = twins(dtype=torch.bfloat16)
    add_adapter(both.ours, FullConfig())
    norms = [p for name, p in both.ours.named_parameters() if "norm" in name]
    first = torch.stack(norms)
    list(train(both.ours, [batch] * 3, TrainConfig(steps=3, learning_rate=1e-4, warmup=0.0, decay="constant")))
    assert norms[0].dtype == torch.bfloat16
    assert (torch.stack(norms) != first).any()
    with exhibit.theirs("transformers") as peer:
        model = both.reload().train()
        before = model.model.norm.weight.detach().clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        for _ in range(3):
            model(batch.ids, labels=batch.ids).loss.backward()
            optimizer.step()
        peer.right = bool((model.model.norm.weight != before).any())


def test_alpha_over_rank(exhibit, twins, stir, ids, apart, tmp_path):
    """rasbt/LLMs-from-scratch#821, rasbt/LLMs-from-scratch#1080, ml-explore/mlx-examples#982: LoRA's update is scaled
    by alpha in one place and by alpha / rank in another."""
    both = twins()
    with torch.no_grad():
        base = both.ours(ids)
    given = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(both.theirs, given)
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    load_adapter(both.ours, tmp_path / "adapter")
    (layer, *_) = find_lora_layers(both.ours).values()
    assert layer.scale == 12 / 4
    with torch.no_grad():
        found = both.ours(ids)
        assert apart(found, base) > 0.01
        with exhibit.theirs("peft") as peer:
            peer.right = apart(model.eval()(ids).logits, found) < 1e-5 and all(
                module.scaling["default"] == 3 for module in peft_layers(model)
            )


def test_an_alpha_of_zero(exhibit, twins, stir, ids, tmp_path):
    """verl-project/verl#5325, verl-project/verl#6380: an export writes lora_alpha 0, and the adapter has no effect."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(4, 16.0, targets=("q_proj",)))
    stir(both.ours)
    save_adapter(both.ours, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    assert json.loads(file.read_text())["lora_alpha"] == 16
    file.write_text(file.read_text().replace('"lora_alpha": 16', '"lora_alpha": 0'))
    with exhibit.refused("lora_alpha: 0 must be"):
        load_adapter(load_model(both.folder), tmp_path / "adapter")
    with exhibit.theirs("peft", refusal="alpha") as peer, torch.no_grad():
        base = both.theirs(ids).logits
        model = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
        peer.right = not torch.equal(model(ids).logits, base)


def test_evaluation_changes_no_weight(exhibit, twins, stir, batch, ids):
    """microsoft/LoRA#34, microsoft/LoRA#61, Lightning-AI/lit-llama#185, espnet/espnet#5722: eval() merges the adapter
    into the base and train() takes it out again, wrong or never."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(4))
    stir(both.ours)
    before = {name: t.clone() for name, t in both.ours.state_dict().items()}
    for _ in range(3):
        both.ours.eval()(ids)
        both.ours.train()
    assert all(torch.equal(t, before[name]) for name, t in both.ours.state_dict().items())
    with exhibit.theirs("peft") as peer:
        model = peft.get_peft_model(both.theirs, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        stir(model)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        model.eval()(ids)
        model.train()
        peer.right = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_generation_in_training_mode(exhibit, twins, tokenizer):
    """huggingface/trl#155, karpathy/nanoGPT#749, karpathy/ng-video-lecture#62: a model in training mode generates with
    dropout, so that greedy answers differ from one call to the next."""
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    both = twins("gpt2", **dropout)
    greedy = GenerateConfig(max_new_tokens=12, temperature=0)
    wanted = generate(both.ours.eval(), tokenizer, ["abc"], greedy)
    both.ours.train()
    assert generate(both.ours, tokenizer, ["abc"], greedy) == wanted
    assert both.ours.training
    with exhibit.theirs("transformers") as peer:
        given = torch.tensor([tokenizer.encode("abc")])
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
        calls = [both.theirs.train().generate(given, generation_config=config).tolist() for _ in range(2)]
        peer.right = calls[0] == calls[1]


def test_a_rate_that_trains_nothing(exhibit, twins, batch):
    """huggingface/peft#710: the loss of prefix-tuning does not fall: at LoRA's learning rate the prefix stays its
    initial noise."""
    both = twins()
    add_adapter(both.ours, PrefixConfig(8, init="peft"))
    movement, config = Movement.start(both.ours), TrainConfig(steps=3, learning_rate=2e-4)
    for _ in train(both.ours, [batch] * 3, config):
        pass
    assert any(text.startswith("dead adapter: ") for text in movement.measure(both.ours, config).warnings)
    with exhibit.theirs("peft", warning="learning rate|init") as peer:
        given = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        model = peft.get_peft_model(both.theirs, given).train()
        table = model.prompt_encoder["default"].embedding.weight
        start, optimizer = table.detach().clone(), torch.optim.AdamW([table], lr=2e-4)
        for _ in range(3):
            model(batch.ids, labels=batch.labels).loss.backward()
            optimizer.step()
        peer.right = bool((table - start).abs().max() > 0.1 * start.std())
