"""An adapter from minipeft to Hugging Face PEFT and back: the same logits, the same bytes.

    python examples/peft_roundtrip.py                       # on a tiny Llama of random weights
    python examples/peft_roundtrip.py --model FOLDER        # on yours (GPT-2, Llama, Mistral)

Needs `pip install peft transformers`. docs/peft-names.md lists PEFT's names beside ours.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import minipeft
from minipeft.adapters.inspection import as_table, describe
from minipeft.models.llama import Llama, LlamaConfig


def tiny_model(folder: Path) -> Path:
    """Save a Llama of random weights in Hugging Face's layout."""
    model = Llama(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    model.initialize(torch.Generator().manual_seed(0))
    minipeft.save_model(model, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with config.json and safetensors")
    with tempfile.TemporaryDirectory() as work:
        run(parser.parse_args().model or tiny_model(Path(work, "base")), Path(work))


def run(base: Path, work: Path) -> None:
    model = minipeft.load_model(base, dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    config = minipeft.LoRAConfig(rank=8, alpha=16, rslora=True, rank_pattern={"0.*": 4})
    print(minipeft.add_adapter(model, config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # noise in place of training: at its init an adapter changes nothing
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
        ours = model(ids)
    minipeft.save_adapter(model, work / "ours")

    print(f"\n1. minipeft wrote:\n{as_table(describe(work / 'ours'))}")
    peer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peer = PeftModel.from_pretrained(peer, work / "ours").eval()
    with torch.no_grad():
        theirs = peer(ids).logits
    print(f"\n2. PEFT loads it: its logits differ by {(theirs - ours).abs().max():.1e} of {ours.abs().max():.1f}")

    peer.save_pretrained(work / "theirs")
    minipeft.remove_adapter(model)
    minipeft.load_adapter(model, work / "theirs")
    with torch.no_grad():
        print(f"3. PEFT saves it, minipeft loads it: logits differ by {(model(ids) - ours).abs().max():.1f}")
    first, second = (load_file(work / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    print(f"4. {len(first)} tensors, every byte {'equal' if equal else 'NOT EQUAL'}")
    assert equal
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()


if __name__ == "__main__":
    main()
