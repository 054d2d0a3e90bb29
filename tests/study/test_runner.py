"""A whole study: its files, resuming, failed cells, and refused arguments."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minipeft import files
from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.files import lock_folder
from minipeft.metrics.execution import run_programs
from minipeft.runs.folder import check_folder
from minipeft.runs.process import ProcessConfig
from minipeft.study import executed, runner
from minipeft.study.cells import Cell
from minipeft.study.data import load_study_data
from minipeft.study.presets import StudyConfig
from minipeft.study.progress import Bar
from minipeft.study.runner import take_first_line

FIELDS = [
    "model", "method", "recipe", "seed", "init", "reparam", "learning_rate", "steps", "trainable", "trainable_percent",
    "bleu", "codebleu", "codebleu_compat", "exact_match", "chrf", "valid_python", "empty", "repeated", "hit_limit",
    "peak_memory_bytes", "train_seconds", "tokens_per_second", "dev_loss", "adapter_movement",
]  # fmt: skip


def line(out: Path, model: Path | str, pairs: Path, *more: str) -> list[str]:
    return ["study", "--model", str(model), "--data", str(pairs), "--out", str(out), "--threads", "1", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, broken, pairs) -> tuple[Path, list[str], int]:
    """A study of a sound and a broken model, each cell in its own process."""
    out = tmp_path_factory.mktemp("studies") / "study"
    words = [
        "study",
        "--model",
        str(model),
        str(broken),
        "--data",
        str(pairs),
        "--out",
        str(out),
        "--threads",
        "1",
        "--method",
        "prompt",
        "--steps",
        "2",
    ]
    return out, words, main(words)


def test_what_a_study_leaves(finished, model, pairs):
    out, _, status = finished
    assert status == 2  # the broken model's cells failed
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("minipeft study --")
    assert f"--model {model} " in results["command"]
    digest = hashlib.sha256(pairs.read_bytes()).hexdigest()
    about = {"source": str(pairs), "pairs": 4, "questions": 4, "train_sha256": digest, "test_sha256": digest}
    assert results["data"] == about
    rows = {row["cell"]: row for row in results["cells"]}
    row = rows["stories260K--prompt--seed0"]
    assert set(FIELDS) <= row.keys()
    assert (row["method"], row["steps"], row["init"], row["learning_rate"]) == ("prompt", 2, "text", 3e-2)
    assert row["trainable"] == 20 * 64
    assert row["adapter_movement"]["steps"] == 2
    assert any("few" in flag for flag in row["flags"])
    assert row["bleu_interval"][0] <= row["bleu"] <= row["bleu_interval"][1]
    assert row["difference"].keys() == {"value", "low", "high", "p_value"}
    assert rows["stories260K--zero-shot--seed0"]["difference"] is None
    assert rows["empty-answer"]["codebleu"] == 0
    assert rows["empty-answer"]["codebleu_compat"] == pytest.approx(0.25)
    folder = out / "cells" / "stories260K--prompt--seed0"
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 4
    assert "trainable" in (folder / "log.txt").read_text()


def test_a_cell_that_fails_is_shown_and_ends_nothing(finished):
    out, _, _ = finished
    rows = {row["cell"]: row for row in json.loads((out / "results.json").read_text())["cells"]}
    for name in ("broken--zero-shot--seed0", "broken--prompt--seed0"):
        assert "model.safetensors" in rows[name]["error"]
        assert "bleu" not in rows[name]
    for report in ("report.md", "report.html"):
        assert "data incomplete" in (out / report).read_text()


def test_the_same_line_again_does_nothing_again(finished, monkeypatch, capsys):
    out, words, _ = finished
    before, ran = json.loads((out / "results.json").read_text()), []
    monkeypatch.setattr(runner, "run_cell", lambda cell, *rest: ran.append(cell.name) or "not run")
    assert main(words) == 2
    assert ran == ["broken--zero-shot--seed0", "broken--prompt--seed0"]  # what failed is tried again
    after = json.loads((out / "results.json").read_text())
    sound = lambda results: [row for row in results["cells"] if row["error"] is None]
    assert sound(after) == sound(before)
    assert "stories260K prompt" in capsys.readouterr().out


def test_seeds_and_a_study_that_grows(inside, tmp_path, model, pairs, capsys):
    words = line(tmp_path / "s", model, pairs, "--method", "prompt", "--steps", "1", "--limit", "2")
    assert main(words) == 0
    assert main([*words, "--seeds", "2", "--json"]) == 0
    assert inside == [
        "stories260K--zero-shot--seed0",
        "stories260K--prompt--seed0",
        "stories260K--zero-shot--seed1",
        "stories260K--prompt--seed1",
    ]
    shown = capsys.readouterr().out
    results = json.loads(shown[shown.index("{") :])
    group = next(group for group in results["groups"] if group["method"] == "prompt")
    scores = [row["bleu"] for row in results["cells"] if row["method"] == "prompt"]
    assert group["seeds"] == [0, 1]
    assert group["bleu"] == pytest.approx(sum(scores) / 2)
    assert group["bleu_sd"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


def test_ctrl_c_then_the_same_line(tmp_path, model, pairs):
    out, steps = tmp_path / "s", 25
    words = line(out, model, pairs, "--method", "lora", "--steps", str(steps), "--limit", "2")
    log = out / "cells" / "stories260K--lora--seed0" / "run" / "log.jsonl"
    started = subprocess.Popen([sys.executable, "-m", "minipeft", *words], stderr=subprocess.PIPE, text=True)
    until(lambda: log.exists() and log.read_text().count("\n") > 3)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=300)
    assert started.returncode == 130
    assert "the same command resumes" in said
    assert not (out / "results.json").exists()
    stopped_at = log.read_text().count("\n") - 1
    assert 3 <= stopped_at < steps
    assert not running(out)
    begun = sorted(os.listdir(log.parent / "checkpoints"))
    assert f"step-{stopped_at:06d}" in begun
    done = subprocess.run([sys.executable, "-m", "minipeft", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(entry)["step"] for entry in log.read_text().splitlines()] == list(range(steps + 1))
    row = json.loads((log.parents[1] / "result.json").read_text())
    assert row["resumed_at"] == stopped_at
    assert not (log.parent / "checkpoints").exists()


def until(claim, seconds: float = 300.0) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(out: Path) -> list[str]:
    """The command lines of processes that work on this study."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [text for text in found if str(out) in text]


def test_what_is_refused(inside, tmp_path, model, pairs, capsys):
    def refused(words, text):
        assert main(words) == 2
        assert text in capsys.readouterr().err

    out = tmp_path / "s"
    words = line(out, model, pairs, "--method", "prompt", "--steps", "1", "--limit", "2")
    assert main(words) == 0
    refused([*words, "--steps", "2"], "was made with other settings (steps)")
    refused([*words, "--limit", "3"], "holds a study of other data or other questions")
    refused([*words, "--data", "demo"], "holds a study of other data")
    with open(out / "study.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(words, "in use by process")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    refused([*words, "--out", str(tmp_path / "other")], "is not empty and holds no study")
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    refused([*words, "--out", str(pairs)], "is a file")
    elsewhere = line(tmp_path / "new", "./nope", pairs)
    refused(elsewhere, "nope: no such folder")
    refused(["study"], "out: must be given: the study's folder")
    refused([*words, "--seeds", "0"], "seeds: 0 must be an integer >= 1")
    refused([*words, "--model", str(model), str(model)], "is given twice")
    assert not (tmp_path / "new").exists()
    for name in ("preset", "method"):
        refused([*words, f"--{name}", "nope"], f"{name}: 'nope' is not known")


def test_nothing_is_written_before_the_folder_is_locked(inside, tmp_path, model, pairs, capsys):
    out = tmp_path / "s"
    words = line(out, model, pairs, "--method", "prompt", "--steps", "1", "--limit", "2")
    out.mkdir()
    with open(out / "study.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(words) == 2
    assert "in use by process" in capsys.readouterr().err
    assert os.listdir(out) == ["study.lock"]
    assert main(words) == 0


def test_the_folder_is_made_with_its_parents_as_train_makes_a_runs(tmp_path, pairs, monkeypatch):
    train, test = load_study_data("demo", None)
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    with runner.open_folder(tmp_path / "a/b/study", train, test):
        assert (tmp_path / "a/b/study/study.json").exists()
    check_folder(tmp_path / "c/d/run")
    assert (tmp_path / "c/d/run").is_dir()
    assert {tmp_path, tmp_path / "a", tmp_path / "a/b", tmp_path / "c", tmp_path / "c/d"} <= set(synced)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, pairs):
    train, test = load_study_data("demo", None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/study: cannot be created: Not a directory"):
        runner.open_folder(tmp_path / "file/study", train, test).__enter__()


def test_a_result_that_is_no_row_is_an_unfinished_cell(inside, tmp_path, model, pairs, capsys):
    words = line(tmp_path / "s", model, pairs, "--method", "prompt", "--steps", "1", "--limit", "2")
    assert main(words) == 0
    before = (tmp_path / "s" / "results.json").read_text()
    results = sorted((tmp_path / "s" / "cells").glob("*/result.json"))
    for place, file in enumerate(results):
        file.write_text("{}" if "prompt" in file.parent.name else ('{"model": ', '{"bleu": "high"}')[place % 2])
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "prompt--seed0/result.json: field 'cell' is missing; the cell is not finished and resumes" in said
    varying = ("peak_memory_bytes", "resumed_at")
    kept = lambda row: {name: value for name, value in row.items() if name not in varying}
    rows = lambda text: [kept(row) for row in json.loads(text)["cells"]]
    assert rows((tmp_path / "s" / "results.json").read_text()) == rows(before)


def test_modules_in_the_current_folder_are_not_imported(tmp_path, model, pairs, monkeypatch):
    """A cell is `python -m ...`, which puts the current folder on sys.path unless it is told not to."""
    out, trap = tmp_path / "s", "from pathlib import Path\nPath(__file__ + '.ran').touch()\nraise SystemExit(7)\n"
    for folder in (tmp_path, out):
        folder.mkdir(exist_ok=True)
        for name in ("tqdm", "html", "statistics", "tokenizers"):
            (folder / f"{name}.py").write_text(trap)
    monkeypatch.chdir(tmp_path)
    cell = Cell("m", "prompt")
    with Bar([cell], {}, out, 1, ()) as bar:
        error = runner.run_cell(cell, out, ProcessConfig(), bar, [])
    assert "training run" in error  # of this cell there is none
    assert not list(tmp_path.rglob("*.ran"))


def test_the_study_and_score_give_the_same_interval(inside, tmp_path, model, capsys):
    """Both draw whole questions: of 24 pairs of 8 questions here."""
    file = tmp_path / "pairs.jsonl"
    add = lambda q: f"x = f({', '.join('abcdefg'[: q % 5 + 1])}, {q})"
    rows = [{"intent": f"add {n} to `x`", "snippet": add(n // 3), "question_id": n // 3} for n in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "s"
    assert main(line(out, model, file, "--method", "prompt", "--steps", "1")) == 0
    cells = json.loads((out / "results.json").read_text())["cells"]
    row = next(row for row in cells if row["method"] == "nearest training pair")
    capsys.readouterr()
    assert main(["score", str(out / "cells" / row["cell"] / "predictions.jsonl"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert row["questions"] < row["pairs"] == scores["pairs"]
    assert scores["bleu_interval"] == row["bleu_interval"]
    assert row["bleu_interval"][0] < row["bleu"] < row["bleu_interval"][1]


def test_a_model_that_can_no_longer_be_read_fails_its_own_cells(inside, tmp_path, model, pairs, capsys):
    away = tmp_path / "away"
    shutil.copytree(model, away)
    words = ["study", "--model", str(model), str(away), "--data", str(pairs), "--out", str(tmp_path / "s")]
    words += ["--method", "prompt", "--steps", "1", "--limit", "2"]
    assert main(words) == 0
    shutil.rmtree(away)
    assert main(words) == 2
    rows = {row["cell"]: row for row in json.loads((tmp_path / "s" / "results.json").read_text())["cells"]}
    assert rows["stories260K--prompt--seed0"]["error"] is None
    assert "no such folder" in rows["away--prompt--seed0"]["error"]


def test_first_line():
    assert take_first_line("\n\nx = 1\ny = 2\n") == "x = 1"
    assert take_first_line("") == ""


def test_a_study_of_shell_commands_has_no_column_of_python(inside, tmp_path, model, capsys):
    file = tmp_path / "shell.jsonl"
    rows = [{"intent": f"show {n} lines", "snippet": f"cat file{n} | head -n {n}", "question_id": n} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "s"
    assert main(line(out, model, file, "--method", "prompt", "--steps", "1")) == 0
    assert "The references are text: most references are not Python" in " ".join(capsys.readouterr().out.split())
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert [row["method"] for row in cells[:3]] == ["empty answer", "echo the question", "nearest training pair"]
    assert all(row["valid_python"] is None and row["bleu_13a"] is not None for row in cells)
    for report in ("report.md", "report.html"):
        text = (out / report).read_text()
        assert "BLEU 13a" in text
        assert "CodeBLEU, strict" not in text
        assert "CodeBLEU is strict" not in text
        assert "(invalid" not in text


def test_the_answers_of_the_demo_are_run(inside, tmp_path, model, pairs, capsys, monkeypatch):
    """The prompt's answer is made right for the first question, in words of its own, and empty for the second one."""
    out = tmp_path / "s"
    words = ["study", "--model", str(model), "--data", "demo", "--out", str(out), "--threads", "1", "--limit", "2"]
    words += ["--method", "prompt", "--steps", "1"]
    assert main(words) == 0
    file = out / "cells" / "stories260K--prompt--seed0" / "predictions.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    rows[0]["prediction"], rows[1]["prediction"] = f"({rows[0]['reference']})", ""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran_programs = []
    monkeypatch.setattr(executed, "run_programs", lambda new: ran_programs.extend(new) or run_programs(new))
    status = main([*words, "--execute"])
    if "cannot isolate programs" in capsys.readouterr().err:
        pytest.skip("no user namespaces")
    assert status == 0
    cells = {row["cell"]: row for row in json.loads((out / "results.json").read_text())["cells"]}
    assert cells["stories260K--prompt--seed0"]["pass_at_1"] == 0.5
    assert cells["empty-answer"]["pass_at_1"] == 0.0
    answered = sum(row["pass_at_1"] is not None for row in cells.values())
    assert len(ran_programs) == len(set(ran_programs)) < 2 * answered  # an answer that two cells gave runs once
    ran = [json.loads(row)["status"] for row in (file.parent / "executed.jsonl").read_text().splitlines()]
    assert ran == ["passed", "failed"]
    page = (out / "report.html").read_text()
    assert "(passes" in page
    assert '<th scope="col">passes</th>' in page
    assert main(words) == 0  # what was run stays in the results
    assert '"pass_at_1": 0.5' in (out / "results.json").read_text()
    assert main(line(tmp_path / "other", model, pairs, "--execute")) == 2
    assert "execute: only the demo's pairs have programs. minipeft score FILE --execute" in capsys.readouterr().err


SAME = ("model", "method", "seed", "steps", "bleu", "codebleu", "dev_loss", "loss", "adapter_movement", "error")


def rows_of(out: Path) -> dict[str, dict]:
    """What is the same in each row however its cell ran; times are not."""
    found = json.loads((out / "results.json").read_text())["cells"]
    return {row["cell"]: {name: row.get(name) for name in SAME} for row in found}


def test_workers_run_cells_at_once_with_the_same_numbers(finished, tmp_path, model, pairs):
    """Both cells are begun before either is finished, and all that does not tell the time is that of one worker."""
    words = line(tmp_path / "s", model, pairs, "--method", "prompt", "--steps", "2", "--workers", "2")
    assert main(words) == 0
    before, after = rows_of(finished[0]), rows_of(tmp_path / "s")
    assert after == {name: row for name, row in before.items() if not name.startswith("broken")}
    for name in ("predictions.jsonl", "run/adapter/adapter_model.safetensors", "run/log.jsonl"):
        files = [out / "cells/stories260K--prompt--seed0" / name for out in (finished[0], tmp_path / "s")]
        assert files[0].read_bytes() == files[1].read_bytes()
    folders = [tmp_path / "s/cells" / f"stories260K--{method}--seed0" for method in ("zero-shot", "prompt")]
    begun = [(folder / "cell.json").stat().st_mtime for folder in folders]
    assert max(begun) < min((folder / "result.json").stat().st_mtime for folder in folders)


def test_shares_of_a_study_and_the_report_of_all(inside, tmp_path, model, pairs, capsys):
    """As the tasks of a scheduler's array; the folder has one report, which the last share writes."""
    words = line(tmp_path / "s", model, pairs, "--method", "prompt", "--steps", "1", "--limit", "2", "--seeds", "2")
    assert main([*words, "--cell", "1/3"]) == 0
    first = list(inside)
    assert "without --cell the command finishes and reports all" in capsys.readouterr().err
    assert not (tmp_path / "s/results.json").exists()
    assert main([*words, "--cell", "3/3"]) == 0
    assert main([*words, "--cell", "2/3"]) == 0
    assert len(inside) == len(set(inside)) == 4
    assert first
    assert set(rows_of(tmp_path / "s")) > set(inside)
    assert main(words) == 0
    assert len(inside) == 4, "nothing is left"
    with pytest.raises(InputError, match=r"cell: '4/3' must be I/N with 1 <= I <= N, such as 1/4"):
        StudyConfig(cell="4/3")


def test_a_cell_that_another_share_runs_is_refused(inside, tmp_path, model, pairs, capsys):
    words = line(tmp_path / "s", model, pairs, "--method", "prompt", "--steps", "1", "--limit", "2")
    folder = tmp_path / "s/cells/stories260K--prompt--seed0"
    assert main([*words, "--cell", "2/3"]) == 0  # answers untrained
    folder.mkdir(exist_ok=True)
    with lock_folder(folder):
        assert main(words) == 2
    assert "prompt failed: " in capsys.readouterr().err
    assert main(words) == 0
