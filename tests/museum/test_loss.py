"""Loss, masks and packing: the loss covers the requested tokens, and packed documents equal separate rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM

from minipeft import LoRAConfig, TrainConfig, add_adapter, encode_pairs, load_tokenizer, pack, train
from minipeft.data.examples import Example, Pair
from minipeft.data.packing import Batch
from minipeft.models import Decoder
from minipeft.models.loss import count_targets
from minipeft.runs.config import run_config

IGNORED = -100


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the supervised tokens, in float64."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())


def mean_loss(model: Decoder, batch: Batch) -> Tensor:
    """Our loss per supervised token."""
    return model.loss(batch.ids, batch.labels, batch.documents) / count_targets(batch.labels)


def test_packed_documents_are_separate(exhibit, twins, ids, apart):
    """huggingface/trl#3910, huggingface/trl#1230, huggingface/trl#3067, hiyouga/LlamaFactory#4224,
    MeetKai/functionary#132, huggingface/alignment-handbook#204: without FlashAttention, documents that share a packed
    row see each other."""
    both = twins()
    row = torch.cat([ids[0, :10], ids[1, :14]])[None]
    documents = torch.tensor([[0] * 10 + [1] * 14])
    with torch.no_grad():
        alone = both.theirs(ids[1:, :14]).logits
        assert apart(both.ours(row, documents)[:, 10:], alone) < 1e-5
    with exhibit.theirs("transformers") as peer, torch.no_grad():
        collator = transformers.DataCollatorWithFlattening(return_position_ids=True)
        packed = collator([{"input_ids": ids[0, :10].tolist()}, {"input_ids": ids[1, :14].tolist()}])
        given = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"], "use_cache": False}
        peer.right = apart(both.theirs(**given).logits[:, 10:], alone) < 1e-4


def test_accumulated_batches_are_one_batch(exhibit, twins, tokenizer, apart, tmp_path):
    """huggingface/transformers#34191, hiyouga/LlamaFactory#7443, axolotl-ai-cloud/axolotl#1100, huggingface/trl#2175,
    huggingface/transformers#37766: gradient accumulation over batches of unequal length is not one large batch."""
    both = twins()
    rows = [torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 20, 7, 15)]
    norms = {}
    for batch in (1, 4):
        model = twins().ours
        add_adapter(model, LoRAConfig(2))
        batches = [padded(rows)] if batch == 4 else [padded([row]) for row in rows]
        (step,) = train(model, batches, TrainConfig(steps=1, accumulate=4 // batch, warmup=0, clip=1e9))
        norms[batch] = (step.loss, step.grad_norm)
    assert norms[1] == pytest.approx(norms[4], rel=1e-5)
    with exhibit.theirs("transformers") as peer:
        logs = [trainer_log(both.reload(), padded(rows), tmp_path, batch) for batch in (1, 4)]
        peer.right = all(logs[0][key] == pytest.approx(logs[1][key], rel=1e-3) for key in ("loss", "grad_norm"))


def padded(rows: list[list[int]]) -> Batch:
    """Rows of different lengths as one batch, padded on the right."""
    width = max(map(len, rows))
    fill = lambda row, filling: [*row, *[filling] * (width - len(row))]
    ids = torch.tensor([fill(row, 0) for row in rows])
    labels = torch.tensor([[IGNORED, *fill(row, IGNORED)[1:]] for row in rows])
    return Batch(ids, labels, torch.tensor([fill([0] * len(row), -1) for row in rows]))


def trainer_log(model: nn.Module, rows: Batch, folder: Path, batch: int) -> dict[str, float]:
    """The log of one optimizer step of transformers' Trainer over the rows, `batch` at a time."""
    data = [
        {"input_ids": ids[owners >= 0], "labels": labels[owners >= 0]}
        for ids, labels, owners in zip(rows.ids, rows.labels, rows.documents)
    ]

    def collate(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        made = padded([feature["input_ids"].tolist() for feature in features])
        labels = nn.utils.rnn.pad_sequence([f["labels"] for f in features], batch_first=True, padding_value=IGNORED)
        return {"input_ids": made.ids, "labels": labels, "attention_mask": (made.documents >= 0).long()}

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=len(data) // batch,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1e9,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]


def test_nothing_left_to_train_on(exhibit, twins, tokenizer, ids, tmp_path):
    """huggingface/trl#6668, huggingface/trl#3927, Liquid4All/liquid-finetune#37: where truncation or the mask leaves no
    label, the reported loss is 0 and the run ends without an error."""
    examples = [Example([5] * 30 + [6, 0], 30) for _ in range(4)]
    with exhibit.refused("no token is left to take a loss on"):
        pack(examples, tokenizer, length=16, loss_mask="response")
    both = twins()
    with exhibit.theirs("transformers", refusal="label") as peer:
        rows = Batch(ids, torch.full_like(ids, IGNORED), torch.zeros_like(ids))
        peer.right = trainer_log(both.theirs, rows, tmp_path, 2)["loss"] > 0


def test_a_step_without_a_label(exhibit, twins, ids):
    """ml-explore/mlx-lm#1355, huggingface/trl#5826: a batch in which every label is masked divides by zero."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(2))
    batch = Batch(ids, torch.full_like(ids, IGNORED), torch.zeros_like(ids))
    with exhibit.refused("step 1: no token of this step's batches is supervised"):
        list(train(both.ours, [batch], TrainConfig(steps=1)))
    with exhibit.theirs("transformers", refusal="label") as peer:
        peer.right = bool(both.theirs(ids, labels=batch.labels).loss.isfinite())


def test_examples_that_lost_their_answer(exhibit, tokenizer):
    """huggingface/trl#6025: examples whose answer was cut off stay in the data and dilute it."""
    examples = [Example([5] * 30 + [6, 0], 30), Example([5, 5, 6, 0], 2)]
    batches = pack(examples, tokenizer, length=16, batch=1, loss_mask="response")
    assert (batches.report.left_out, batches.report.documents_cut, batches.report.targets) == (1, 1, 2)
    assert "1 without a supervised token left out" in str(batches.report)
    assert batches[0].ids.tolist() == [[5, 5, 6, 0] + [0] * 12]


def test_long_examples_are_counted(exhibit, tokenizer):
    """axolotl-ai-cloud/axolotl#775, axolotl-ai-cloud/axolotl#2211: examples longer than a row are silently dropped or
    cut."""
    batches = pack([Example([5] * 20, 0), Example([6] * 4, 0)], tokenizer, length=16, batch=1)
    report = batches.report
    assert (report.documents_cut, report.tokens_cut, report.tokens_out) == (1, 4, 20)
    assert "1 documents were too long: 4 tokens cut off their ends" in str(report)


def test_a_mask_and_a_fused_loss(exhibit, twins, ids):
    """huggingface/trl#3781: with a fused loss kernel the assistant mask is ignored, and the whole text is trained
    on."""
    both = twins()
    labels = ids.clone()
    labels[:, :15] = IGNORED
    batch = Batch(ids, labels, torch.zeros_like(ids))
    with torch.no_grad():
        assert mean_loss(both.ours, batch).item() == pytest.approx(by_hand(both.theirs(ids).logits, labels).item())
    with exhibit.theirs("transformers") as peer, torch.no_grad():
        wanted = by_hand(both.theirs(ids).logits, labels).item()
        peer.right = both.theirs(ids, labels=labels).loss.item() == pytest.approx(wanted, rel=1e-5)


def loss_and_gradient(both: object, ids: Tensor, apart: Callable[[Tensor, Tensor], float]) -> tuple[bool, bool]:
    """Whether loss and embedding gradient, ours and theirs, are those of the logits by hand."""
    batch = Batch(ids, ids.clone(), torch.zeros_like(ids))
    wanted = by_hand(both.theirs(ids).logits, ids)
    (slope,) = torch.autograd.grad(wanted, both.theirs.model.embed_tokens.weight)
    losses = (mean_loss(both.ours, batch), both.theirs(ids, labels=ids).loss)
    weights = (both.ours.embedding.weight, both.theirs.model.embed_tokens.weight)
    found = [torch.autograd.grad(loss, weight)[0] for loss, weight in zip(losses, weights)]
    equal = [loss.item() == pytest.approx(wanted.item(), rel=1e-5) for loss in losses]
    return tuple(same and apart(g, slope) < 1e-4 for same, g in zip(equal, found))


def test_soft_cap_in_a_fused_loss(exhibit, twins, ids, apart):
    """apple/ml-cross-entropy#48, linkedin/Liger-Kernel#320, huggingface/trl#6629: a fused loss leaves out Gemma 2's
    soft cap of the logits."""
    both = twins("gemma2", head_dim=8, final_logit_softcapping=3.0, sliding_window=64, query_pre_attn_scalar=8)
    assert isinstance(both.theirs, Gemma2ForCausalLM)
    ours, theirs = loss_and_gradient(both, ids, apart)
    assert ours
    with exhibit.theirs("transformers") as peer:
        peer.right = theirs


def test_logit_scale_in_a_fused_loss(exhibit, twins, ids, apart):
    """unslothai/unsloth#11277: a fused loss leaves out Granite's scale of the logits."""
    ours, theirs = loss_and_gradient(twins("granite", logits_scaling=8.0), ids, apart)
    assert ours
    with exhibit.theirs("transformers") as peer:
        peer.right = theirs


def test_padding_is_no_target(exhibit, twins, ids):
    """ml-explore/mlx-lm#1697, huggingface/optimum-habana#1503: the padding after a text counts in its loss."""
    both = twins()
    row = ids[0, :9].tolist()
    with torch.no_grad():
        wanted = by_hand(both.theirs(ids[:1, :9]).logits, ids[:1, :9]).item()
        batch = padded([row, ids[1].tolist()])
        first = Batch(*(t[:1] for t in (batch.ids, batch.labels, batch.documents)))
        assert count_targets(first.labels) == 8
        assert mean_loss(both.ours, first).item() == pytest.approx(wanted, rel=1e-5)


def test_the_loss_mask_of_a_config(exhibit):
    """ml-explore/mlx-examples#1313: a loss mask set in the config file or by a flag is ignored."""
    assert run_config("lora", model="demo", data="demo", loss_mask="response").packing.loss_mask == "response"
    with exhibit.refused("mask_prompt"):
        run_config("lora", model="demo", data="demo", mask_prompt=True)
    exhibit.ours = "right"


def write_merging_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that merges a newline and a space."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: number for number, sign in enumerate(["<|endoftext|>", *signs, "ĊĠ"])}
    backend = Backend(models.BPE(vocab, [("Ċ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def test_prompt_and_answer_are_cut_at_the_prompt(exhibit, tmp_path):
    """huggingface/trl#5213, huggingface/trl#6105: the tokens of prompt and answer together do not begin with those of
    the prompt, and the mask is cut at the wrong place."""
    write_merging_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    (example,) = encode_pairs([Pair("q", "  return 1")], tokenizer)
    prompt = tokenizer.encode("### Instruction:\nq\n### Response:\n")
    assert example.ids[: example.prompt_tokens] == prompt
    assert tokenizer.decode(example.ids) == "### Instruction:\nq\n### Response:\n  return 1"
    with exhibit.theirs("transformers") as peer:
        peers = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = "### Instruction:\nq\n### Response:\n"
        alone, whole = peers(text)["input_ids"], peers(text + "  return 1")["input_ids"]
        peer.right = whole[: len(alone)] == alone
