"""Every block of docs/data.md runs as it stands, with a small model of a chat template in place of the one it names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minipeft import cli
from minipeft.runs import estimates
from tests.small import write_small_model

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
TEMPLATE = """{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ eos_token }}{% endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    write_small_model(place / "model", "llama", layers=1)
    (place / "model/chat_template.jinja").write_text(TEMPLATE)
    return place


def run_block(kind: str, text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a block prints. A line that is one minipeft command runs in this process, which has imported torch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    text = text.replace("Qwen/Qwen2.5-0.5B-Instruct", str(place / "model"))
    if kind == "python":
        exec(compile(text, "docs/data.md", "exec"), {})
        return capsys.readouterr().out
    said = ""
    for part in re.split(r"^(minipeft .*\n)", text, flags=re.MULTILINE):
        if part.startswith("minipeft "):
            assert cli.main(shlex.split(part)[1:]) == 0, capsys.readouterr().err
            said += capsys.readouterr().out
        elif part.strip():
            part = part.replace("| minipeft ", f"| {sys.executable} -m minipeft ")
            command = ["bash", "-euo", "pipefail", "-c", part]
            ran = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, timeout=300)
            assert ran.returncode == 0, ran.stderr
            said += ran.stdout
    return said


def test_the_blocks_run_one_after_the_other(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would type them; the outputs that the page speaks of are there."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    capsys.readouterr()
    said = [run_block(kind, text, place, capsys) for kind, text in BLOCKS]
    assert [kind for kind, _ in BLOCKS] == ["bash"] * 4 + ["python"] + ["bash"]
    assert "s:Answer in code.<|endoftext|>u:one more<|endoftext|>a:[x += 1<|endoftext|>]" in said[0]
    assert "u:twice<|endoftext|>a:[x *= 2<|endoftext|>]" in said[0]
    assert "2 of the 2 rows held out are also trained on" in said[2]
    assert said[4].startswith("x -= 1x *= 2\n3 documents of ")
    assert re.fullmatch(r"tokens-[0-9a-f]{64}\.safetensors", said[5].splitlines()[-1])
    assert (place / "runs/qa/adapter/minipeft_data.json").exists()
