"""The blocks of docs/five-minutes.md and of the pages after it run, as far as a CPU can, with few steps."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minipeft import cli
from minipeft.cli import make_parser
from minipeft.runs import estimates, planning
from tests.small import write_pairs, write_small_model
from tests.study.inside import patch

ROOT = Path(__file__).resolve().parents[1]
ASKS = "minipeft generate --model demo --dtype fp32 --adapter runs/lora/adapter --data demo"
SMALLER = {  # what a page says -> what is run
    "--steps 300 --length 256": "--steps 2 --length 128 --held-out 4",
    "--data demo --method lora --dtype fp32 --steps 20 --length 128 --held-out 10": "--data pairs.jsonl --method lora "
    "--dtype fp32 --steps 2 --length 128 --held-out 4",
    ASKS: f"{ASKS} --limit 3 --max-new-tokens 4",
    "study --method lora prompt": "study --method lora --steps 2 --length 128 --held-out 4 --limit 1",
    "'count `scores` for each `city`'": "--max-new-tokens 4 'count `scores` for each `city`'",
    "--data demo --out merged": "--data demo --limit 1 --out merged",
    "--device cuda": "--device cpu",
    'torch.device("cuda")': 'torch.device("cpu")',
    "Qwen/Qwen2.5-7B --data demo": "small --data pairs.jsonl --steps 2 --length 128 --held-out 4",
    "Qwen/Qwen2.5-7B": "small",
    "--length 1024": "--length 64",
    '"Qwen/Qwen2.5-Coder-0.5B"': '"small"',
    '"conala"': '"demo"',
    "steps=600": "steps=2",
}
MARK = "<!-- needs a GPU -->\n"


def read_blocks(page: str) -> list[tuple[bool, str, str]]:
    """Each block: whether it needs a GPU, its language, its text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        (bool(m), kind, block)
        for m, kind, block in re.findall(rf"({MARK})?```(bash|python)\n(.*?)```", text, re.DOTALL)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Qwen 2, for the models of the hub."""
    place = tmp_path_factory.mktemp("docs")
    write_small_model(place / "small", "qwen2", layers=1, max_position_embeddings=512)
    write_pairs(place / "pairs.jsonl")
    return place


@pytest.fixture(autouse=True)
def without_measuring(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    monkeypatch.setattr(planning, "count_step_bytes", lambda model, ids: 0)  # slow, and not what is shown


def run_block(kind: str, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a block; returns what it prints. A minipeft command runs in this process, which has imported torch."""
    for said, put in SMALLER.items():
        text = text.replace(said, put)
    capsys.readouterr()
    if kind == "python":
        exec(compile(text, "docs", "exec"), {})
    for line in text.splitlines() if kind == "bash" else ():
        if line.startswith("python -c "):
            exec(shlex.split(line)[2], {})
        elif line.startswith("minipeft "):
            assert cli.main(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        else:
            subprocess.run(["bash", "-euc", line], check=True)
    said = capsys.readouterr()
    return said.out + said.err


def run_page(page: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each block of a page prints, those that need a GPU left out."""
    return [run_block(kind, text, capsys) for gpu, kind, text in read_blocks(page) if not gpu and "pip " not in text]


def test_five_minutes_and_what_is_done_with_its_adapter_and_answers(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch.setattr)  # the study's cells run in this process
    assert "pip install -c constraints.txt ." in read_blocks("five-minutes.md")[0][2]  # what .ci/run does
    trained, studied, python = run_page("five-minutes.md", capsys)
    assert len((place / "answers.jsonl").read_text().splitlines()) == 3
    assert "BLEU" in trained
    assert (place / "runs/study/report.html").exists()
    assert "nearest training pair" in studied
    assert python.splitlines()[0].split() == ["method", "lora"]
    assert (place / "adapter/adapter_config.json").exists()

    shutil.copy(place / "answers.jsonl", place / "others.jsonl")
    (scored,) = run_page("scores.md", capsys)
    assert "minus others.jsonl" in scored
    (merged,) = run_page("merging.md", capsys)
    assert "KL" in merged
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in (place / "merged").iterdir()}


def test_your_gpu_on_a_cpu(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """Each block but one runs with cpu in place of cuda; the commands of that one are commands with such flags."""
    (needs,) = [text for gpu, _, text in read_blocks("your-gpu.md") if gpu]
    for line in needs.splitlines():
        if line.startswith("minipeft "):
            make_parser().parse_args(shlex.split(line)[1:])
    build, backend, plans, _, compared, _ = run_page("your-gpu.md", capsys)
    assert build.split() == [torch.__version__, str(torch.cuda.is_available())]
    assert backend == "reference\n"
    assert "on H100" in plans
    assert "equal within 0.0001: 49 outputs and 49 gradients" in compared
    runs = [(place / folder / "log.jsonl").read_text().splitlines() for folder in ("runs/on-cpu", "runs/on-gpu")]
    losses = [[json.loads(line)["loss"] for line in run if '"loss"' in line] for run in runs]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_your_model(capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = run_page("models.md", capsys)
    assert "equal within 0.0001" in said


def test_a_cuda_device_without_cuda_is_refused_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cli.main(["generate", "--model", "small", "--device", "cuda", "x"]) == 2
    refusal = "device: 'cuda' cannot be used: Torch not compiled with CUDA enabled"
    assert refusal in capsys.readouterr().err
    assert refusal in " ".join((ROOT / "docs/your-gpu.md").read_text(encoding="utf-8").split())


def test_the_library_in_15_lines() -> None:
    ((_, _, code),) = [block for block in read_blocks("five-minutes.md") if block[1] == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    assert all(said in code for said in ('"Qwen/Qwen2.5-Coder-0.5B"', '"conala"', "steps=600"))
