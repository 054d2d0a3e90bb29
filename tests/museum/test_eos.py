"""Special tokens and generation: an answer ends, is its own, and text is never a control token."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from minipeft import LoRAConfig, TrainConfig, add_adapter, encode_pairs, generate, load_tokenizer, pack, train
from minipeft.data.examples import Example, Pair
from minipeft.generation import GenerateConfig, answer
from minipeft.models.checkpoint import load_model
from tests.museum.twins import Twins
from tests.small import write_tokenizer

GREEDY = GenerateConfig(max_new_tokens=8, temperature=0)


def peer_tokenizer(folder: Path, **changes: object) -> transformers.PreTrainedTokenizerFast:
    """transformers' tokenizer of the folder's files."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", **changes
    )


def test_eos_is_learned_where_it_also_pads(exhibit, tokenizer, tmp_path):
    """mlabonne/llm-course#33, huggingface/trl#976, unslothai/unsloth#416, huggingface/blog#1302,
    NVIDIA-NeMo/Megatron-Bridge#4660, ibm-granite/granite-3.1-language-models#2: where the padding token is EOS, EOS is
    masked out of the labels, and the model never learns to stop."""
    examples = [Example([5, 6, 0], 1), Example([7, 8, 9, 10, 0], 1)]
    batches = pack(examples, tokenizer, length=8, batch=2, shuffle=False)
    assert batches[0].labels.flatten().tolist().count(0) == 2  # both EOS, and no padding
    with exhibit.theirs("transformers") as peer:
        collator = transformers.DataCollatorForLanguageModeling(
            peer_tokenizer(tmp_path, pad_token="<|endoftext|>"), mlm=False
        )
        made = collator([{"input_ids": example.ids} for example in examples])
        peer.right = made["labels"].flatten().tolist().count(0) == 2


def test_the_last_target_is_eos(exhibit, tmp_path):
    """ludwig-ai/ludwig#3945: where the padding token is not EOS, texts end in padding."""
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "!"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad not in (None, tokenizer.eos)
    (example,) = encode_pairs([Pair("q", "x")], tokenizer)
    row = pack([example], tokenizer, length=64, batch=1)[0]
    assert row.labels[row.documents >= 0][-1] == tokenizer.eos
    assert (row.labels[row.documents < 0] == -100).all()


def test_the_tokenizer_adds_no_eos(exhibit, tokenizer, tmp_path):
    """huggingface/transformers#22794: a fast tokenizer ignores add_eos_token, and the texts have no end."""
    (example,) = encode_pairs([Pair("q", "x")], tokenizer)
    assert example.ids[-1] == tokenizer.eos
    with exhibit.theirs("transformers") as peer:
        peer.right = peer_tokenizer(tmp_path, add_eos_token=True)("x")["input_ids"][-1] == 0


def test_a_trained_model_stops(exhibit, twins, tokenizer):
    """huggingface/trl#734, brevdev/launchables#4: a fine-tuned model generates until the limit, and nothing says that
    the answer was cut."""
    both = twins()
    examples = encode_pairs([Pair("a", "xy"), Pair("b", "z")], tokenizer)
    prompts = ["### Instruction:\na\n### Response:\n", "### Instruction:\nb\n### Response:\n"]
    (first, *_) = answer(both.ours, tokenizer, prompts, GREEDY)
    assert first.ended == "limit"
    add_adapter(both.ours, LoRAConfig(8))
    batches = pack(examples, tokenizer, length=96, batch=1, loss_mask="response")
    for _ in train(both.ours, batches, TrainConfig(steps=60, learning_rate=1e-2)):
        pass
    answers = sorted(answer(both.ours, tokenizer, prompts, GREEDY), key=lambda a: a.index)
    assert [(a.text, a.ended) for a in answers] == [("xy", "eos"), ("z", "eos")]


def test_every_end_token_ends(exhibit, twins, tokenizer, tmp_path):
    """vllm-project/vllm#4180, oobabooga/textgen#5885, ollama/ollama#3759, huggingface/transformers#31362: a chat model
    whose generation_config.json names a second end token continues past it."""
    both = twins()
    (free,) = answer(both.ours, tokenizer, ["abc"], GREEDY)
    assert free.ended == "limit"
    stop = free.ids[3]
    assert json.loads((both.folder / "config.json").read_text())["eos_token_id"] == 0
    (both.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop]}))
    (found,) = answer(load_model(both.folder), tokenizer, ["abc"], GREEDY)
    assert (found.ids, found.ended) == (free.ids[: free.ids.index(stop)], "eos")
    with exhibit.theirs("transformers") as peer:
        given = torch.tensor([tokenizer.encode("abc")])
        made = both.reload().generate(given, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, 3:].tolist()
        peer.right = made == [*found.ids, stop]


def with_bos(folder: Path) -> None:
    """A tokenizer that puts a BOS token before each text."""
    write_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    number = len(spec["model"]["vocab"])
    spec["model"]["vocab"]["<s>"] = number
    spec["added_tokens"] = [
        {"id": number, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    ]  # fmt: skip
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<s>"}))


def test_one_bos(exhibit, tmp_path):
    """huggingface/alignment-handbook#127, deepseek-ai/DeepSeek-R1#151, abetlen/llama-cpp-python#1501,
    vllm-project/vllm#16976: a text that begins with BOS, as a chat template writes it, gets a second one."""
    with_bos(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<s>hello")
    assert ids.count(tokenizer.bos) == 1
    (example,) = encode_pairs([Pair("q", "x")], tokenizer)
    assert example.ids.count(tokenizer.bos) == 1
    with exhibit.theirs("transformers") as peer:
        peers = peer_tokenizer(tmp_path, bos_token="<s>")
        peer.right = peers("<s>hello")["input_ids"].count(tokenizer.bos) == 1


def test_control_tokens_in_a_users_text(exhibit, tmp_path):
    """huggingface/transformers#29279, google-deepmind/gemma#770, vllm-project/vllm#11691: the name of a control token
    in a user's text becomes that token, and ends or forges a turn."""
    with_bos(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a<|endoftext|>b<s>c", bos=False)
    assert not {tokenizer.eos, tokenizer.bos} & set(ids)
    assert tokenizer.decode(ids) == "a<|endoftext|>b<s>c"
    with exhibit.theirs("transformers") as peer:
        found = peer_tokenizer(tmp_path, bos_token="<s>")("a<|endoftext|>b<s>c", add_special_tokens=False)["input_ids"]
        peer.right = not {tokenizer.eos, tokenizer.bos} & set(found)


def peer_answers(both: Twins, rows: list[list[int]], side: str) -> list[list[int]]:
    """Greedy answers of transformers' generate to a batch of rows padded on that side."""
    width = max(map(len, rows))
    pad = lambda row, filling: [filling] * (width - len(row))
    fill = lambda row, filling: [*pad(row, filling), *row] if side == "left" else [*row, *pad(row, filling)]
    ids = torch.tensor([fill(row, 0) for row in rows])
    mask = torch.tensor([fill_mask(row, width, side) for row in rows])
    made = both.theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    return made[:, width:].tolist()


def fill_mask(row: list[int], width: int, side: str) -> list[int]:
    """1 for a token, 0 for padding."""
    pads = [0] * (width - len(row))
    return [*pads, *[1] * len(row)] if side == "left" else [*[1] * len(row), *pads]


@pytest.fixture
def prompts() -> list[str]:
    return ["a", "def f(x):", "longer than the others"]


def test_a_batch_answers_as_each_alone(exhibit, twins, tokenizer, prompts):
    """unslothai/unsloth#3699, huggingface/transformers#25790, TransformerLensOrg/TransformerLens#1005,
    Blaizzy/mlx-vlm#1542: in a batch of prompts of different lengths, the shorter ones get different answers."""
    both = twins()
    alone = [generate(both.ours, tokenizer, [prompt], GREEDY)[0] for prompt in prompts]
    assert generate(both.ours, tokenizer, prompts, GREEDY) == alone
    with exhibit.theirs("transformers") as peer:
        rows = tokenizer.encode_all(prompts)
        single = [peer_answers(both, [row], "left")[0] for row in rows]
        peer.right = peer_answers(both, rows, "left") == single


def test_the_default_padding_side(exhibit, twins, tokenizer, prompts, tmp_path):
    """huggingface/transformers#30378: tokenizers pad on the right by default, and a batch is then answered wrong."""
    both = twins()
    rows = tokenizer.encode_all(prompts)
    assert generate(both.ours, tokenizer, prompts, GREEDY) == [
        generate(both.ours, tokenizer, [prompt], GREEDY)[0] for prompt in prompts
    ]
    with exhibit.theirs("transformers", warning="right-padding was detected") as peer:
        side = peer_tokenizer(tmp_path, pad_token="<|endoftext|>").padding_side
        single = [peer_answers(both, [row], side)[0] for row in rows]
        peer.right = peer_answers(both, rows, side) == single


def test_prompts_beyond_the_context(exhibit, twins, tokenizer):
    """CarperAI/trlx#130, huggingface/transformers#530, openai/gpt-2#121: a prompt longer than the context fails deep in
    the model, after a warning at most."""
    both = twins("gpt2")
    with exhibit.refused("prompt 1: 200 tokens and 8 new ones exceed the context, 96. Cut it to 88 tokens"):
        generate(both.ours, tokenizer, ["a" * 200], GREEDY)
    with exhibit.theirs("transformers", failure="index out of range", refusal="context") as peer:
        made = both.theirs.generate(torch.ones(1, 200, dtype=torch.long), do_sample=False, max_new_tokens=8)
        peer.right = made.shape[1] == 208


def test_ids_beyond_the_vocabulary(exhibit, twins, tmp_path):
    """huggingface/tokenizers#1609, BlinkDL/RWKV-LM#346, pytorch/torchtitan#1495, 01-ai/Yi#448: a tokenizer with more
    tokens than the model has embeddings fails in the middle of training."""
    both = twins()
    with_bos(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    with exhibit.refused("257"):
        tokenizer.check_fits(both.ours.config.vocab_size)
    with exhibit.theirs("transformers", failure="index out of range") as peer:
        made = both.theirs(torch.tensor([[tokenizer.bos, 5]]))
        peer.right = made.logits.shape[-1] > tokenizer.bos
