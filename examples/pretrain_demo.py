"""Pretrain the demo model (minipeft/demo/model): a small GPT-2 on Python sources, from nothing, on one CPU core.

    python examples/pretrain_demo.py --out runs/one      # stop it at any time: the same command resumes
    python examples/pretrain_demo.py --out runs/two --start runs/one/model --pairs 60 --rate 1e-3 --steps 0

The first stage reads Python sources (minipeft/demo/corpus.py): a byte-level BPE is trained on them, documents are
packed in rows, and minipeft.train does the rest. The second starts from a model and reads general pairs of a request
and its code, with a share of the sources. --steps 0 is one epoch. OUT/model is the finished model.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minipeft
from minipeft.data.examples import Example
from minipeft.data.packing import Batches
from minipeft.data.tokens import Tokenizer
from minipeft.demo import corpus
from minipeft.models import GPT2, GPT2Config

KINDS = ("train", "held_out")


def prepare(a: argparse.Namespace) -> tuple[Batches, Batches, Tokenizer]:
    """The batches to train on and those to hold out; ids and tokenizer are kept in OUT for the next start."""
    folder, kept = a.out / "model", a.out / "corpus.safetensors"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = list(corpus.make_documents(corpus.list_source_files()[: a.files]))
        random.Random(a.seed).shuffle(documents)
        if a.start is None:
            backend = corpus.train_tokenizer([d.text for d in documents if not d.held_out], a.vocab)
        else:
            backend = minipeft.load_tokenizer(a.start).backend
            documents = [*documents[: a.sources], *corpus.make_pair_documents(a.pairs, a.seed)]
            random.Random(a.seed).shuffle(documents)
        corpus.save_tokenizer(backend, folder, a.length)
        tensors = {}
        for kind in KINDS:
            pieces = corpus.cut_pieces(
                [d.text for d in documents if d.held_out is (kind != "train")], backend, a.length
            )
            tensors[f"{kind}.ids"] = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32)
            tensors[f"{kind}.lengths"] = torch.tensor([len(piece) for piece in pieces])
        save_file(tensors, kept)
    tensors, tokenizer, batches = load_file(kept), minipeft.load_tokenizer(folder), []
    for kind in KINDS:
        parts = tensors[f"{kind}.ids"].split(tensors[f"{kind}.lengths"].tolist())
        examples = [Example(part.tolist(), 0) for part in parts]
        batches.append(minipeft.pack(examples, tokenizer, length=a.length, batch=a.rows, seed=a.seed))
    return batches[0], batches[1], tokenizer


def bytes_per_target(batches: Batches, tokenizer: Tokenizer) -> float:
    """The mean length of a supervised token: a letter of a byte-level token is a byte, the end mark is none."""
    width = [len(tokenizer.backend.id_to_token(i)) for i in range(tokenizer.size)]
    width[tokenizer.require_eos()] = 0
    lengths = [width[label] for _, labels in batches.documents for label in labels if label >= 0]
    return sum(lengths) / len(lengths)


def tensors_of(model: GPT2, state: minipeft.TrainState) -> dict[str, torch.Tensor]:
    """All tensors of a run by name: the weights and AdamW's two moments."""
    parts = {"model": dict(model.named_parameters()), "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    return {f"{part}.{name}": t.detach() for part, tensors in parts.items() for name, t in tensors.items()}


def save(file: Path, model: GPT2, state: minipeft.TrainState, log: list[dict]) -> None:
    """Write the whole run to one file, by rename: a kill leaves the old or the new file."""
    save_file(tensors_of(model, state), file.with_suffix(".part"), metadata={"log": json.dumps(log)})
    file.with_suffix(".part").rename(file)


def restore(file: Path, model: GPT2, state: minipeft.TrainState) -> list[dict]:
    """Fill model and state from the checkpoint, if there is one; returns its log."""
    if not file.exists():
        return []
    with safe_open(file, "pt") as stream:
        for name, tensor in tensors_of(model, state).items():
            tensor.copy_(stream.get_tensor(name))
        log = json.loads(stream.metadata()["log"])
    state.step = log[-1]["step"]
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=2e-3, help="the peak (default: %(default)s)")
    parser.add_argument("--files", type=int, help="read only the first so many files")
    parser.add_argument("--start", help="second stage: a folder or hub id of the model to continue from")
    parser.add_argument("--pairs", type=int, default=60, help="second stage: times that each wording is filled")
    parser.add_argument(
        "--sources", type=int, default=6000, help="second stage: number of the first stage's documents to read again"
    )
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    sizes = {"vocab": 4096, "width": 256, "layers": 4, "heads": 4, "length": 512}
    for name, default in {**sizes, "rows": 4, "steps": 6557, "save_every": 100, "seed": 0}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help="(default: %(default)s)")
    a = parser.parse_args()
    torch.set_num_threads(1)
    batches, held_out, tokenizer = prepare(a)
    shape = {"vocab_size": a.vocab, "n_positions": a.length, "n_embd": a.width, "n_layer": a.layers, "n_head": a.heads}
    marks = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.require_eos())
    if a.start is None:
        model = GPT2(GPT2Config(**shape, **marks, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        model.initialize(torch.Generator().manual_seed(a.seed))
    else:
        model = minipeft.load_model(a.start, dtype=torch.float32)
    print(minipeft.add_adapter(model, minipeft.FullConfig()), batches.report, held_out.report, sep="\n")
    state, file = minipeft.TrainState(model), a.out / "checkpoint.safetensors"
    log = restore(file, model, state)
    a.steps = a.steps or len(batches)
    config = minipeft.TrainConfig(steps=a.steps, learning_rate=a.rate, warmup=0.04, decay="cosine",
                                  weight_decay=0.05, beta2=0.95)  # fmt: skip
    began, width = time.time() - (log[-1]["seconds"] if log else 0), bytes_per_target(held_out, tokenizer)
    # Without cache_enabled=False autocast would keep its bfloat16 copies of step 0's weights to the end of the block.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False, enabled=a.bf16):
        for step in minipeft.train(model, batches, config, state):
            if step.number % a.save_every == 0 or step.number == a.steps:
                nats = minipeft.evaluate(model, list(held_out)[: None if step.number == a.steps else 8])
                bits = nats / math.log(2) / width
                row = {"step": step.number, "loss": step.loss, "held_out": nats, "bits_per_byte": bits}
                log.append({**row, "seconds": round(time.time() - began)})
                print(json.dumps(log[-1]), flush=True)
                save(file, model, state, log)
    minipeft.save_model(model.to(torch.bfloat16), a.out / "model")


if __name__ == "__main__":
    main()
