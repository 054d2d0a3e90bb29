"""The model card: its entries, its YAML, and its command, which makes the same run."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from minipeft import cli
from minipeft.models.checkpoint import fingerprint
from minipeft.runs import estimates
from minipeft.runs.card import make_train_command, make_training_card
from minipeft.runs.config import run_config
from tests.small import write_pairs, write_small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two steps of LoRA on it."""
    folder = tmp_path_factory.mktemp("publishing")
    write_small_model(folder / "model", "llama", layers=1)
    write_pairs(folder / "pairs.jsonl", 8)
    words = ["--model", folder / "model", "--data", folder / "pairs.jsonl", "--out", folder / "run", "--held-out", 2]
    words += ["--rank", 2, "--steps", 2, "--length", 64, "--lr", 0.02]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "probe_flops", lambda *_: 1e9)
        assert cli.main(["train", *map(str, words)]) == 0
    return folder


def test_it_says_what_the_adapter_is(folder: Path) -> None:
    text = (folder / "run/adapter/README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["minipeft", "lora"]}
    result, about = (json.loads((folder / "run" / name).read_text()) for name in ("result.json", "run.json"))
    for said in (
        "# LoRA adapter of model",
        f"sha256 {about['data_sha256']} |",
        f"sha256 {fingerprint(folder / 'model')} |",
        f"| loss | {result['loss']:.4f} in training, {result['dev_loss']:.4f} held out (nats per ",
        f"minipeft {about['minipeft']}, torch {about['torch']}",
    ):
        assert said in text
    assert str(folder) not in text  # no path of this machine
    assert "adapter/README.md" not in result["files"]  # it may be edited


def test_its_base_is_named_where_it_is_the_hubs() -> None:
    hashes, result = (
        {"model_sha256": "m", "data_sha256": "d"},
        {"loss": 1.0, "trainable": 5, "trainable_percent": 1.0, "steps": 2},
    )
    config = run_config("lora", base=(0, "llama"), model="owner/small", data="a|b\n---\n.json", revision="v2")
    text = make_training_card(config, hashes, result)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/small"
    assert "| base | owner/small at v2, sha256 m |" in text
    assert r"| data | a\|b\n---\n.json, sha256 d |" in text


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"rank": 4, "targets": ("q_proj", "v_proj"), "layers": (0, 1), "learning_rate": 1e-3}),
        ("dora", {"targets": r".*\.[01]\..*q_proj", "dropout": 0.1, "alpha_pattern": {"q_proj": 4.0}}),
        ("lora", {"lr_multiplier": {"lora_B": 16.0}, "isolate": False, "dtype": "bf16", "steps": 7}),
        ("prefix", {"virtual_tokens": 5, "init": "normal", "warmup": 0.0}),
        ("full", {"epochs": 1.5, "activation_checkpointing": True, "evaluate_every": 3}),
    ],
)
def test_its_command_makes_the_same_run(method: str, settings: dict[str, object]) -> None:
    base = (10**8, "llama")
    config = run_config(method, base=base, model="owner/small", data="a b.json", **settings)
    words = shlex.split(make_train_command(config))
    options = cli.make_parser().parse_args(words[1:])
    again = run_config(options.method, base=base, **cli.train.read_run_settings(options))
    assert again == config


def test_a_resumed_run_writes_the_same_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = folder / "run/adapter/README.md"
    before = card.read_bytes()
    card.write_text("mine")  # an edited card is not a damaged run
    arguments = json.loads((folder / "run/run.json").read_text())["arguments"]
    words = ["train", "--model", folder / "model", "--data", folder / "pairs.jsonl", "--out", folder / "run"]
    words += [
        "--held-out",
        2,
        "--rank",
        2,
        "--steps",
        2,
        "--length",
        64,
        "--lr",
        arguments["learning_rate"],
        "--resume",
    ]
    assert cli.main([str(word) for word in words]) == 0
    assert card.read_text() == "mine"
    (folder / "run/result.json").unlink()  # the run's end is done again
    leftover = folder / "run/adapter/.README.md.abcdefgh"  # of a process that died
    leftover.write_text("half")
    (folder / "pairs.jsonl").rename(folder / "renamed.jsonl")
    words[4] = folder / "renamed.jsonl"
    assert cli.main([str(word) for word in [*words, "--save-every", 1]]) == 0
    assert card.read_bytes() == before
    assert not leftover.exists()
