"""Greedy decoding beside transformers and PEFT, in one run: the same prompts, the same number of tokens, the same ids.

    python benchmarks/generation.py --model FOLDER --out benchmarks/results/generation-cpu.json

A call answers `--batch` prompts of 40 random tokens with 32 tokens each, the pass over the prompts included; EOS does
not end an answer. One thread. Packing the weights, which `generate` does once, has a row of its own.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import torch

PROMPT, NEW = 40, 32


def make_ours(source: str, dtype: torch.dtype, adapted: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions ids [B, T] -> ids [B, NEW], with packed and plain weights, and one that packs."""
    import minipeft
    from minipeft.generation import decode
    from minipeft.models.packed import PackedModel

    model = minipeft.load_model(source, dtype=dtype)
    if adapted:
        minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32))
    tokenizer, config = minipeft.load_tokenizer(source), minipeft.GenerateConfig(max_new_tokens=NEW, temperature=0)
    held = {True: PackedModel(model), False: PackedModel(model, empty=True)}

    def run(ids: torch.Tensor, packed: bool) -> torch.Tensor:
        with held[packed].used():
            made, _ = decode(model, tokenizer, list(range(len(ids))), ids.tolist(), config, ())
        return torch.tensor(made)

    return {
        "minipeft": lambda ids: run(ids, True),
        "minipeft, plain weights": lambda ids: run(ids, False),
        "packing": lambda ids: torch.tensor(len(PackedModel(model).held)),
    }


def make_theirs(source: str, dtype: torch.dtype, adapted: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same with transformers, or PEFT."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.generation_config = transformers.GenerationConfig()
    if adapted:
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    model.eval()

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        return made[:, ids.shape[1] :]

    return run


def main() -> None:
    """Measure each batch, with and without an adapter, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 25])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[measure.Row] = []
    for name in options.dtypes:
        for adapted in (False, True):
            peer = "peft, LoRA" if adapted else "transformers"
            ours = make_ours(options.model, getattr(torch, name), adapted)
            theirs = make_theirs(options.model, getattr(torch, name), adapted)
            for batch in options.batch:
                ids = torch.randint(0, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
                variants = {peer: theirs, **ours}
                if batch != options.batch[0]:
                    variants.pop("packing")
                want, got = theirs(ids), ours["minipeft"](ids)
                found = measure.measure(
                    {label: partial(call, ids) for label, call in variants.items()},
                    name="decoding",
                    shape=f"{batch} x ({PROMPT} + {NEW})",
                    dtype=name,
                    rounds=options.rounds,
                    calls=1,
                    warmups=1,
                    packages=("transformers", "peft"),
                    note=f"greedy; {int((want == got).sum())} of {want.numel()} ids equal the peer's",
                    busy=options.busy,
                )
                measure.show_rows(found)
                rows += found
                if options.out:
                    measure.write_rows(Path(options.out), rows)


if __name__ == "__main__":
    main()
