"""The paper's models and data behind a hub on this machine: config.json in full size, and a few pairs as CoNaLa."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from minipeft.data.reading import CONALA_COMMIT
from minipeft.study.paper import MODELS
from tests.hub import FILES, NEW, point_at, serve
from tests.small import write_tokenizer

Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]  # name -> commit -> file -> bytes

GPT2_SIZES = {"GPT-2": (768, 12, 12), "GPT2-M": (1024, 24, 16), "GPT2-L": (1280, 36, 20), "GPT2-XL": (1600, 48, 25)}
CODEGPT = {"CodeGPT-small": 50001, "CodeGPT-adapted": 50260}
WHOLE = {  # config.json of the eight, as on the hub
    **{
        name: {"model_type": "gpt2", "vocab_size": CODEGPT.get(name, 50257), "n_positions": 1024,
               "n_embd": size[0], "n_layer": size[1], "n_head": size[2]}
        for name, size in {**GPT2_SIZES, **dict.fromkeys(CODEGPT, GPT2_SIZES["GPT-2"])}.items()
    },
    "CodeLlama-7B": {"model_type": "llama", "vocab_size": 32016, "hidden_size": 4096, "intermediate_size": 11008,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                     "max_position_embeddings": 16384, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    "Mistral-7B": {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False,
                   "torch_dtype": "bfloat16"},
}  # fmt: skip
PAIRS = {
    f"data/conala-paired-{split}.json": json.dumps(
        [{"question_id": n, "intent": f"add {n}", "rewritten_intent": f"add {n}", "snippet": f"x += {n}"} for n in ids]
    ).encode()
    for split, ids in (("train", range(20)), ("test", range(30, 34)))
}


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a small tokenizer."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def list_configs(folder: Path) -> Repositories:
    """The eight repositories with config.json in full size and a small tokenizer, without weights."""
    small = read_tokenizer(folder / "tokenizer")
    return {
        f"models/{MODELS[name]}": {NEW: {"config.json": json.dumps(config).encode(), **small}}
        for name, config in WHOLE.items()
    }


@contextmanager
def serve_repositories(monkeypatch: pytest.MonkeyPatch, folder: Path, held: Repositories) -> Iterator[str]:
    """Serve these repositories and the pairs to the client in this process; yields the hub's address."""
    for name, commits in {**held, "datasets/neulab/conala": {CONALA_COMMIT: PAIRS}}.items():
        monkeypatch.setitem(FILES, name, commits)
    with serve() as port:
        point_at(monkeypatch, folder, port)
        yield f"http://127.0.0.1:{port}"
