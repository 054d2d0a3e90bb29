"""Generation with many adapters in one batch: minipeft's AdapterBank against HF PEFT's mixed batch (`adapter_names`).

    python benchmarks/bank.py --model FOLDER                    # a Llama, Mistral or GPT-2 in safetensors
    python benchmarks/bank.py --model FOLDER --out benchmarks/results/bank-cpu.json

Each batch has 16 prompts with 1, 4 or 16 different LoRA adapters (rank 16, every linear): prefill and greedy decoding,
from the same files, in interleaved rounds. PEFT loops over the adapters in every linear; the bank stacks them once a
batch. If the tokens of both differ in more than 5 %, the row is a FAIL without a ratio.
"""

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import peft
import torch
import transformers

import minipeft
from minipeft.adapters.bank import AdapterBank
from minipeft.generation import GenerateConfig, answer

ROWS, PROMPT = 16, 8


class Numbers:
    """A tokenizer for texts of decimal ids, so that both sides get the same ids."""

    eos = bos = None

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=3)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=8, help="new tokens per row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows: list[measure.Row] = []
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        folders = make_adapters(arguments, Path(work), max(arguments.adapters))
        ours, theirs = load_our_bank(arguments, folders), load_their_model(arguments, folders)
        for threads, count in itertools.product(arguments.threads, arguments.adapters):
            torch.set_num_threads(threads)
            found = compare(ours, theirs, count, threads, arguments)
            measure.show_rows(found)
            rows += found
    if arguments.out:
        measure.write_rows(arguments.out, rows)


def load(arguments: argparse.Namespace) -> torch.nn.Module:
    """Load the base, without end-of-text tokens that would end a row early."""
    model = minipeft.load_model(arguments.model, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    return model


def make_adapters(arguments: argparse.Namespace, work: Path, count: int) -> list[Path]:
    """Save adapters with a random B, large enough that their answers differ."""
    model = load(arguments)
    folders = []
    for i in range(count):
        minipeft.add_adapter(model, minipeft.LoRAConfig(rank=arguments.rank, alpha=2.0 * arguments.rank), seed=i)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.02, generator=torch.Generator(p.device).manual_seed(i))
        folders.append(work / str(i))
        minipeft.save_adapter(model, folders[-1])
        minipeft.remove_adapter(model)
    return folders


def load_our_bank(arguments: argparse.Namespace, folders: list[Path]) -> AdapterBank:
    bank = AdapterBank(load(arguments))
    for folder in folders:
        bank.load(folder.name, folder)
    return bank


def load_their_model(arguments: argparse.Namespace, folders: list[Path]) -> torch.nn.Module:
    dtype = getattr(torch, arguments.dtype)
    base = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


def compare(
    bank: AdapterBank, theirs: torch.nn.Module, count: int, threads: int, arguments: argparse.Namespace
) -> list[measure.Row]:
    """Time both on one batch, and the base alone; `extra` holds tokens per second."""
    vocabulary, new = bank.model.config.vocab_size, arguments.tokens
    ids = torch.randint(vocabulary, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0)).to(arguments.device)
    prompts = [" ".join(map(str, row)) for row in ids.tolist()]
    names = [str(row % count) for row in range(ROWS)]
    config = GenerateConfig(max_new_tokens=new, temperature=0, batch=ROWS)

    def ours(adapters: list[str] | None) -> list[list[int]]:
        return [
            a.ids
            for a in sorted(answer(bank.model, Numbers(), prompts, config, adapters=adapters), key=lambda a: a.index)
        ]

    greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    mask = torch.ones_like(ids)
    peer = lambda: theirs.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, adapter_names=names)
    mine, wanted = ours(names), peer()[:, PROMPT:].tolist()
    equal = sum(a == b for row in zip(mine, wanted) for a, b in zip(*row)) / (ROWS * new)
    calls: dict[str, Callable[[], object]] = {
        "peft, adapter_names": peer,
        "minipeft, bank": lambda: ours(names),
        "minipeft, base": lambda: ours(None),
    }
    found = measure.measure(
        calls,
        name="bank",
        shape=f"{ROWS}x{PROMPT}+{new} r{arguments.rank} {count} adapters",
        dtype=arguments.dtype,
        device=arguments.device,
        rounds=arguments.rounds,
        warmups=0,
        threads=threads,
        busy=arguments.busy,
        packages=("peft", "transformers"),
    )
    for row in found:
        row.extra.update(
            tokens_per_second=round(ROWS * new / row.median, 2),
            times_base=round(1 / row.ratios["minipeft, base"], 3),
            equal_tokens=equal,
            different_answers=len({tuple(row) for row in mine}),
        )
        print("  ", row.variant, row.extra)
    return found if equal > 0.95 else [dataclasses.replace(row, ratio=0.0, note="FAIL: other tokens") for row in found]


if __name__ == "__main__":
    main()
