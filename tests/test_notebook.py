"""What a notebook shows: short reprs, tables, one line for an InputError, a progress bar; seen in an IPython kernel."""

import re

import pytest
import torch

import minipeft
from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.data.examples import encode_pairs, load_pairs
from minipeft.data.forms import load_data
from minipeft.data.packing import pack
from minipeft.data.tokens import load_tokenizer
from minipeft.models.checkpoint import load_model
from minipeft.tour.bench import Bench
from minipeft.tour.book import measure_stop
from minipeft.tour.notebooks import list_cells, list_numbers
from minipeft.tour.stops import read_stops
from minipeft.training.loop import TrainConfig, TrainState, train
from tests.small import write_adapter, write_pairs, write_small_model

STOPS = ("tokens", "lora")  # of the tour
CELLS = {
    "import": "import minipeft\nfrom minipeft import *\nfrom minipeft.data.forms import load_data",
    "load": "model = load_model('model'); tokenizer = load_tokenizer('model'); model",
    "pairs": "pairs = load_pairs('pairs.jsonl'); pairs",
    "data": "load_data('pairs.jsonl')",
    "report": "add_adapter(model, LoRAConfig(rank=2))",
    "batches": "batches = pack(encode_pairs(pairs, tokenizer), tokenizer, length=64); batches",
    "batch": "batches[0]",
    "packing": "batches.report",
    "bar": "steps = list(train(model, batches, TrainConfig(steps=3), progress=True))",
    "steps": "steps",
    "no model": "load_model('no/such/model')",
    "no rank": "LoRAConfig(rank=0)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    write_small_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def measured():
    bench, stops = Bench(quick=True), {stop.name: stop for stop in read_stops()}
    return {name: measure_stop(stops[name], bench) for name in STOPS}


@pytest.fixture(scope="module")
def tour(measured):
    """The code of two of the tour's notebooks."""
    cells = {name: list_cells(one, quick=True) for name, one in measured.items()}
    return {name: [text for kind, text in mine if kind == "code"] for name, mine in cells.items()}


@pytest.fixture(scope="module")
def shown(folder, tour):
    """Each cell's outputs, executed in one kernel."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    codes = CELLS | {f"{stop} {n}": code for stop, codes in tour.items() for n, code in enumerate(codes)}
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes.values()])
    resources = {"metadata": {"path": str(folder)}}
    given = {"timeout": 300, "startup_timeout": 300, "allow_errors": True, "resources": resources}
    nbclient.NotebookClient(book, kernel_name="python3", **given).execute()
    return {name: cell.outputs for name, cell in zip(codes, book.cells)}


def text(outputs) -> str:
    """What a cell without other output displays, as plain text."""
    (output,) = outputs
    assert output.output_type == "execute_result", output
    return output.data["text/plain"]


def test_a_notebook_shows_short_texts(shown, folder):
    pairs, tokenizer = load_pairs(folder / "pairs.jsonl"), load_tokenizer(folder / "model")
    packed = pack(encode_pairs(pairs, tokenizer), tokenizer, length=64)
    assert text(shown["pairs"]) == "Pairs(40 pairs of pairs.jsonl)"
    assert text(shown["data"]) == "Data(40 pairs of pairs.jsonl)"
    full = f"{100 * packed.report.tokens_out / (64 * packed.report.rows):.1f} % full"
    assert text(shown["batches"]) == f"Batches({len(packed)} batches of 4 rows of 64 tokens, {full})"
    assert text(shown["batch"]) == "Batch(ids [4, 64], labels [4, 64], documents [4, 64])"
    assert text(shown["report"]).startswith("method     lora\ntrainable  ")
    assert text(shown["packing"]).startswith("40 documents of ")
    first, *_, last = text(shown["steps"]).splitlines()
    assert re.fullmatch(r"\[Step\(1: loss \d\.\d{3}, learning rate 0\.0003, gradient norm [\d.]+, \d+ tokens\),", first)
    assert last.strip().startswith("Step(3: ")


def test_a_notebook_shows_tables_where_they_help(shown):
    (pairs,), (model,) = shown["pairs"], shown["load"]
    assert pairs.data["text/html"].count("<tr>") == 6  # the head and five rows
    assert "add 4" in pairs.data["text/html"]
    assert "add 5" not in pairs.data["text/html"]
    assert re.search(r"GPT2 from .*model: [\d,]+ parameters, all trained, float32 on cpu", model.data["text/html"])
    assert "<details>" in model.data["text/html"]


@pytest.mark.parametrize("cell", ["no model", "no rank"])
def test_an_input_error_is_one_line(shown, cell):
    (error,) = shown[cell]
    assert error.output_type == "error"
    assert len(error.traceback) == 1
    assert error.traceback == [f"InputError: {error.evalue}"]
    assert "\n" not in error.evalue


def test_training_shows_its_progress(shown):
    bar = "".join(output.text for output in shown["bar"] if output.output_type == "stream")
    assert "3/3" in bar
    assert "loss=" in bar


@pytest.mark.parametrize("stop", STOPS)
def test_the_tours_notebooks_run_and_show_the_numbers_of_the_text(shown, tour, measured, stop):
    outputs = [output for n in range(len(tour[stop])) for output in shown[f"{stop} {n}"]]
    assert not [output for output in outputs if output.output_type == "error"]
    assert len(outputs) == len(tour[stop]) - 1  # each but the imports shows something
    texts = [output.data.get("text/markdown") for output in outputs]
    assert list_numbers(measured[stop].values)._repr_markdown_() in texts
    assert max(sum(map(len, output.data.values())) for output in outputs) < 50_000


def test_the_reprs_of_an_ordinary_session(folder):
    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    pairs = load_pairs(folder / "pairs.jsonl")
    encoded = encode_pairs(pairs, tokenizer)
    assert repr(encoded) == f"Encoded(40 examples, {sum(len(one.ids) for one in encoded):,} tokens)"
    assert repr(tokenizer) == "Tokenizer(257 ids)"
    add_adapter(model, LoRAConfig(rank=2))
    state = TrainState(model)
    next(train(model, pack(encoded, tokenizer, length=64), TrainConfig(steps=2), state))
    assert repr(state) == f"TrainState(step 1, {len(state.exp_avg)} trained tensors)"
    assert "Step(number=1, loss=" in repr(minipeft.Step(1, 2.0, 3e-4, 1.0, 4, 4))  # to the last digit outside IPython


def test_the_model_says_what_is_trained(folder, tmp_path):
    model = load_model(folder / "model", dtype=torch.bfloat16)
    minipeft.load_adapter(model, write_adapter(folder / "model", tmp_path / "adapter"))
    assert "none trained, bfloat16 on cpu" in model._repr_html_()
    fresh = load_model(folder / "model")
    report = add_adapter(fresh, LoRAConfig(rank=2))
    assert f"{report.total:,} parameters, {report.trainable:,} trained" in fresh._repr_html_()


def test_a_bank_names_its_adapters(folder, tmp_path):
    bank = minipeft.AdapterBank(load_model(folder / "model"))
    assert repr(bank) == "AdapterBank(empty)"
    bank.load("first", write_adapter(folder / "model", tmp_path / "adapter"))
    assert repr(bank) == "AdapterBank(first)"


def test_texts_of_the_data_are_escaped(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"intent": "<script>alert(1)</script>", "snippet": "' + "x" * 500 + '"}\n')
    for found in (load_pairs(file), load_data(file)):
        page = found._repr_html_()
        assert "<script>" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert len(page) < 1500


def test_a_chat_is_previewed_by_its_turns(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n')
    page = load_data(file)._repr_html_()
    assert "user: hi" in page
    assert "assistant: hello" in page


def test_progress_must_be_a_boolean(folder):
    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    batches = pack(encode_pairs(load_pairs(folder / "pairs.jsonl"), tokenizer), tokenizer, length=64)
    with pytest.raises(minipeft.InputError, match="progress: 1 must be true or false"):
        train(model, batches, TrainConfig(steps=1), progress=1)
