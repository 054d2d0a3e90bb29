"""The data of a study: split by question, any form but plain text, rows that are read back as they were."""

import json

import pytest

from minipeft.cli import main
from minipeft.data.examples import load_pairs
from minipeft.data.forms import load_data
from minipeft.errors import InputError
from minipeft.study.data import as_pairs, find_split, load_study_data, make_row, write_data
from tests.small import write_small_model

FORMS = {
    "pairs": [{"intent": f"add {n}", "snippet": f"x += {n}", "question_id": n // 2} for n in range(20)],
    "prompt and completion": [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(20)],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": str(n)},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": f"{n}!"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
        for n in range(20)
    ],
}
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_data_of_one_file_is_split_by_question(tmp_path, pairs):
    train, test = load_study_data(str(pairs), None)
    assert (len(train), len(test)) == (16, 4)
    assert not {pair.question_id for pair in train} & {pair.question_id for pair in test}
    rows = [{"intent": f"a {n}", "snippet": "b", "question_id": n // 4} for n in range(12)]
    file = tmp_path / "four.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [find_split(load_pairs(file), wanted) for wanted in (3, 4, 7, 11)] == [0, 4, 4, 8]
    with pytest.raises(InputError, match="too few"):
        load_study_data(str(file), None)


def test_the_demo_has_its_own_split():
    train, test = load_study_data("demo", 10)
    assert len(test) == 10
    assert not {pair.question_id for pair in train} & {pair.question_id for pair in load_study_data("demo", None)[1]}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_are_read_back_as_they_were(form, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", FORMS[form])
    train, test = load_study_data(str(file), 3)
    assert (len(train), len(test)) == (16, 3)
    write_data(tmp_path, train, test)
    assert load_data(tmp_path / "data/train.jsonl").items == train.items
    assert [make_row(item) for item in load_data(file)] == FORMS[form]


def test_a_row_is_a_question_and_a_reference_to_the_baselines(tmp_path):
    file = write_rows(tmp_path / "chats.jsonl", FORMS["messages"])
    pair = as_pairs(load_data(file))[3]
    assert (pair.intent, pair.snippet) == ("again", "3!")
    file = write_rows(tmp_path / "qa.jsonl", [{"q": f"{n}?", "a": f"{n}."} for n in range(10)])
    train, test = load_study_data(str(file), None, {"template": "Q: {q}\nA: {a}"})
    assert {(pair.intent[:-1], pair.snippet) for pair in as_pairs(train)} <= {(str(n), f"{n}.") for n in range(10)}
    assert len(test) == 2


def test_text_alone_is_refused_for_it_asks_nothing(tmp_path):
    file = write_rows(tmp_path / "text.jsonl", [{"text": f"once {n}"} for n in range(10)])
    with pytest.raises(InputError, match=r"text.jsonl: holds text, which asks no question. minipeft train continues"):
        load_study_data(str(file))


def test_a_folder_of_files_is_split_and_not_tested_on_what_it_trained(tmp_path):
    """Without CoNaLa's two files both splits of a folder were all its rows."""
    write_rows(tmp_path / "a.jsonl", FORMS["prompt and completion"][:10])
    write_rows(tmp_path / "b.jsonl", FORMS["prompt and completion"][10:])
    train, test = load_study_data(str(tmp_path))
    assert len(train) == 16
    assert not {item.content for item in train} & {item.content for item in test}


@pytest.mark.parametrize("form", ["messages", "template"])
def test_a_study_trains_and_asks_in_the_form_of_the_data(form, tmp_path, capsys):
    """The untrained model gets the same prompts: its cell and that of LoRA name the same form and template."""
    model = write_small_model(tmp_path / "model")
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHAT}))
    rows = FORMS.get(form, [{"q": f"{n}?", "a": f"{n}."} for n in range(20)])
    file = write_rows(tmp_path / "rows.jsonl", rows)
    more = ["--template", "Q: {q} A: {a}"] if form == "template" else []
    words = ["study", "--model", str(model), "--method", "lora", "--data", str(file), "--out", str(tmp_path / "s")]
    assert main([*words, "--steps", "2", "--held-out", "2", "--length", "64", *more]) == 0, capsys.readouterr().err
    kept = json.loads((tmp_path / "s/cells/model--lora--seed0/run/adapter/minipeft_data.json").read_text())
    assert kept["form"] == form
    results = json.loads((tmp_path / "s/results.json").read_text())
    scored = {row["method"]: row for row in results["cells"]}
    assert {"zero-shot", "lora"} <= set(scored)
    assert not [row["error"] for row in results["cells"] if row["error"]]
    answers = [json.loads(line) for line in (tmp_path / "s/cells/model--zero-shot--seed0/predictions.jsonl").open()]
    asked = {
        json.dumps(row): row
        for row in map(make_row, load_data(tmp_path / "s/data/test.jsonl", template=more[1] if more else None))
    }
    wanted = {str(row.get("completion") or row.get("a") or row["messages"][-1]["content"]) for row in asked.values()}
    assert {row["reference"] for row in answers} == wanted
