"""examples/dpo_from_scratch.py: its loss and gradients on a batch that TRL's DPOTrainer made, against TRL's own."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minipeft
from minipeft.adapters.lora import find_lora_layers
from minipeft.data.examples import Example
from tests.small import write_small_model

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).resolve().parents[1] / "examples" / "dpo_from_scratch.py"


def load_page():
    spec = importlib.util.spec_from_file_location("dpo_from_scratch", PAGE)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def adapted(folder):
    """A small model with LoRA away from its init, and its adapter on disk."""
    model = minipeft.load_model(folder / "model")
    minipeft.add_adapter(model, minipeft.LoRAConfig(4))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in find_lora_layers(model).values():
            layer.lora_B.normal_(0, 0.1, generator=draw)
    minipeft.save_adapter(model, folder / "adapter")
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_gradients_are_trls(tmp_path, monkeypatch, family):
    pytest.importorskip("trl", reason="TRL is not installed")
    import peft
    import transformers
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import DPOConfig, DPOTrainer

    page = load_page()
    write_small_model(tmp_path / "model", family)
    model = adapted(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "model" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    texts = [("add one:", " x += 1", " y"), ("b", " pass", " return 3"), ("a longer prompt:", " z", " x.sort()")]
    columns = "prompt_ids", "chosen_ids", "rejected_ids"
    rows = [dict(zip(columns, tokenizer(list(text))["input_ids"])) for text in texts]
    rows = Dataset(InMemoryTable.from_pylist(rows), fingerprint="pairs")
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *given: dataset)  # it is tokenized
    given = DPOConfig(
        str(tmp_path / "trl"), beta=0.3, per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False
    )
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    config.inference_mode = False
    trainer = DPOTrainer(peer, args=given, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    peft.set_peft_model_state_dict(trainer.model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = trainer.compute_loss(trainer.model.eval(), batch)
    wanted.backward()

    documents = []
    for ids, real, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
        prompt = int(real.sum()) - int(answer.sum())
        documents.append(Example(ids[real.bool()].tolist(), prompt))
    page.BETA = 0.3
    loss, margins = page.dpo_loss(model, page.pack(documents[:3], documents[3:]))
    loss.backward()
    assert float(margins.abs().min()) > 1e-4
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for path, layer in find_lora_layers(model).items():
        twin = trainer.model.get_submodule(f"base_model.model.{path}")
        for name, matrix in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            gradient = getattr(twin, name)["default"].weight.grad
            assert (matrix.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), (path, name)


def test_packed_pairs_have_the_loss_of_each_alone(tmp_path):
    """By hand: each answer's log-probability in a pass of its own, and equation 7 in float64."""
    page = load_page()
    write_small_model(tmp_path / "model", "llama")
    model, draw = adapted(tmp_path), torch.Generator().manual_seed(2)
    base = minipeft.load_model(tmp_path / "model")
    made = [Example(torch.randint(0, 257, (n,), generator=draw).tolist(), 3) for n in (9, 5, 12, 7, 6, 4)]

    def alone(which, example):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            each = which(ids).double().log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])
        return each[example.prompt_tokens - 1 :].sum()

    ratio = [alone(model, example) - alone(base, example) for example in made]
    wanted = [0.1 * (chosen - rejected) for chosen, rejected in zip(ratio[:3], ratio[3:])]
    loss, margins = page.dpo_loss(model, page.pack(made[:3], made[3:]))
    torch.testing.assert_close(margins.double(), torch.stack(wanted), rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(-torch.stack(wanted).sigmoid().log().mean().item(), rel=1e-5)
