"""Reading pairs, splitting them by question, encoding them, and the errors of unusable data."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.data import reading as module
from minipeft.data.examples import Pair, Pairs, encode_pairs, load_pairs, split_by_question
from minipeft.data.templates import format_prompt
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError

ROW = {"intent": "add 1 to x", "snippet": "x += 1"}


@pytest.fixture(scope="module")
def conala(assets: Path) -> Path:
    return assets / "data/conala"


def test_conala_is_read_whole(conala: Path) -> None:
    for split, rows, nulls in (("train", 2379, 79), ("test", 500, 23)):
        file = conala / f"conala-paired-{split}.json"
        pairs = load_pairs(file)
        raw = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        wanted = [Pair(r["rewritten_intent"] or r["intent"], r["snippet"], r["question_id"]) for r in raw]
        assert list(pairs) == wanted
        assert [pair.line for pair in pairs] == list(range(1, rows + 1))
        assert pairs.notes == (f"{nulls} of {rows} rows have no rewritten_intent; their intent was used",)
        assert load_pairs(conala, split=split) == pairs  # a folder that holds both files


def test_an_array_is_told_from_lines_by_content(conala: Path, tmp_path: Path) -> None:
    lines = conala / "conala-paired-test.json"
    array = tmp_path / "array.jsonl"
    rows = [json.loads(row) for row in lines.read_text(encoding="utf-8").split("\n") if row]
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert load_pairs(array).items == load_pairs(lines).items
    assert load_pairs(array).sha256 != load_pairs(lines).sha256


@pytest.mark.parametrize(
    "raw",
    [
        b'{"intent": "i", "snippet": "s"}',
        b'\xef\xbb\xbf{"intent": "i", "snippet": "s"}\n',
        b'\r\n{"intent": "i", "snippet": "s"}\r\n\r\n',
        b'{"prompt": "i", "completion": "s", "other": 7}\n',
        b'{"intent": "x", "rewritten_intent": "i", "snippet": "s", "question_id": null}\n',
        b' [{"snippet": "s", "intent": "i"}]\n',
    ],
    ids=["one line", "byte order mark", "windows line ends", "prompt and completion", "rewritten", "array"],
)
def test_what_is_accepted(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "data").write_bytes(raw)
    assert load_pairs(tmp_path / "data").items == (Pair("i", "s"),)


def test_signs_that_end_a_line_elsewhere_stay_in_the_text(tmp_path: Path) -> None:
    row = {"intent": "i", "snippet": "a\u2028b\x85c\x0cd\re\nf"}
    (tmp_path / "data").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8", newline="")
    assert load_pairs(tmp_path / "data").items[0].snippet == row["snippet"]


def line(**fields: object) -> bytes:
    return json.dumps(ROW | fields).encode() + b"\n"


GOOD = line()
CASES: dict[str, tuple[bytes, str]] = {
    "D03 empty": (b"", "FILE: holds no examples"),
    "D03 blanks": (b" \n\r\n", "FILE: holds no examples"),
    "D03 empty array": (b"[]", "FILE: holds no examples"),
    "D05 not UTF-8": (GOOD + b'{"intent": "\xe9"}', f"FILE:2: not UTF-8 at byte {len(GOOD) + 12}"),
    "D06 UTF-16": (GOOD.decode().encode("utf-16"), "FILE: looks like UTF-16. Save it as UTF-8"),
    "D06 UTF-16 without mark": (GOOD.decode().encode("utf-16-le"), "FILE: looks like UTF-16"),
    "D07 gzip": (b"\x1f\x8b\x08\0", "FILE: is a gzip file that is damaged ("),
    "D07 zip": (b"PK\x03\x04", "FILE: is a zip file"),
    "D07 parquet": (b"PAR1\x15\x04", "FILE: is a parquet file"),
    "D08 cut": (GOOD + GOOD[:-9], "FILE:2: not valid JSON: line 2 column"),
    "D09 list": (GOOD + b'["i", "s"]\n', "FILE:2: must be an object, is a list"),
    "D09 in an array": (b"[" + GOOD + b", 7]", "FILE: item 2: must be an object, is a number"),
    "D10 lines after an array": (b"[" + GOOD + b"]\n" + GOOD, "FILE: not valid JSON: line 3 column 1: Extra data"),
    "D10 two on a line": (GOOD.strip() + GOOD, "FILE:1: not valid JSON: line 1 column"),
    "D11 no snippet": (GOOD + b'{"intent": "i"}', "FILE:2: field 'snippet': is missing (the row has: intent)"),
    "D11 no intent": (b'{"snippet": "s"}', "FILE:1: field 'intent': is missing"),
    "D11 no prompt": (b'{"completion": "s"}', "FILE:1: field 'prompt': is missing"),
    "D11 other names": (b'{"a": 1}', "FILE:1: field 'intent': is missing (the row has: a). A row holds intent and"),
    "D12 null": (line(snippet=None), "FILE:1: field 'snippet': must be text, is null"),
    "D12 both null": (line(intent=None, rewritten_intent=None), "FILE:1: field 'intent': must be text, is null"),
    "D13 number": (line(intent=7), "FILE:1: field 'intent': must be text, is a number"),
    "D13 list": (line(snippet=["s"]), "FILE:1: field 'snippet': must be text, is a list"),
    "D13 question_id": (line(question_id="7"), "FILE:1: field 'question_id': must be an integer, is text"),
    "D14 empty": (line(snippet=""), "FILE:1: field 'snippet': is empty"),
    "D14 blank": (line(rewritten_intent=" \n"), "FILE:1: field 'rewritten_intent': is blank"),
    "D15 lone surrogate": (line(snippet="\ud800"), r"FILE:1: field 'snippet': holds a lone surrogate, '\ud800'"),
    "D16 NUL": (line(snippet="a\0b"), "FILE:1: field 'snippet': holds a NUL character at 1"),
    "D17 field": (line(snippet="x" * 2**20), "FILE:1: field 'snippet': has 1,048,576 characters, more than 500,000"),
    "D17 line": (GOOD + line(other="x" * 10**7), "FILE:2: has 10,000,058 characters, more than 10,000,000"),
    "D18 deep": (b'{"intent": ' + b"[" * 100_000, "FILE:1: JSON nested too deep"),
    "D18 deep array": (b"[" * 100_000, "FILE: JSON nested too deep"),
    "D19 duplicate": (b'{"intent": "a", "intent": "b"}', "FILE:1: key 'intent' given twice"),
    "D20 NaN": (b'{"intent": NaN}', "FILE:1: NaN is not JSON"),
    "D21 digits": (b'{"question_id": ' + b"7" * 5000 + b"}", "FILE:1: not usable JSON: "),
    "single quotes": (b"{'intent': 'i'}", "FILE:1: not valid JSON: line 1 column 2"),
}


@pytest.mark.parametrize("case", CASES)
def test_unusable_data_is_one_line(tmp_path: Path, case: str) -> None:
    raw, said = CASES[case]
    file = tmp_path / "data.jsonl"
    file.write_bytes(raw)
    with pytest.raises(InputError) as error:
        load_pairs(file)
    assert str(error.value).startswith(said.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = {"absent": "no such file", ".": "is a directory", "pipe": "is not a plain file"}
    for name, said in places.items():
        with pytest.raises(InputError, match=said):
            load_pairs(tmp_path / name)
    with pytest.raises(InputError, match="is not a plain file"):
        load_pairs("/dev/null")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data"
    file.write_bytes(GOOD)
    seen = os.stat(file)
    file.write_bytes(GOOD + GOOD)  # what fstat saw is one line, what is read are two
    monkeypatch.setattr(module.os, "fstat", lambda _: seen)
    with pytest.raises(InputError, match="changed while it was read"):
        load_pairs(file)


def test_the_limits_can_be_changed(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(line(snippet="x" * 2**20))
    assert len(load_pairs(tmp_path / "data", longest_field=2**20).items[0].snippet) == 2**20
    (tmp_path / "data").write_bytes(GOOD)
    with pytest.raises(InputError, match="field 'intent': has 10 characters, more than 5"):
        load_pairs(tmp_path / "data", longest_field=5)


def test_an_unknown_split_is_refused(conala: Path) -> None:
    with pytest.raises(InputError, match="no split 'dev', only 'train' and 'test'"):
        load_pairs("conala", split="dev")


def test_conala_is_split_in_2279_and_100(conala: Path) -> None:
    whole = load_pairs(conala)
    train, dev = split_by_question(whole)
    assert (len(train), len(dev)) == (2279, 100)
    assert not {pair.question_id for pair in train} & {pair.question_id for pair in dev}
    assert sorted([*train, *dev], key=lambda pair: pair.line) == list(whole)
    assert [pair.line for pair in dev] == sorted(pair.line for pair in dev)
    assert split_by_question(whole) == (train, dev)
    assert split_by_question(whole, seed=1)[1].items != dev.items


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    ids=st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=40),
    held=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_a_split_is_exact_or_refused(ids: list[int | None], held: int, seed: int) -> None:
    pairs = Pairs(tuple(Pair("i", str(n), q, n) for n, q in enumerate(ids)), "F", "")
    try:
        train, dev = split_by_question(pairs, held, seed)
    except InputError:
        sizes = Counter(q if q is not None else f"line {n}" for n, q in enumerate(ids)).values()
        sums = {0}
        for size in sizes:
            sums |= {total + size for total in sums}
        assert held >= len(ids) or held not in sums
        return
    assert len(dev) == held
    assert sorted([*train, *dev], key=lambda pair: pair.line) == list(pairs)
    assert not ({p.question_id for p in train} & {p.question_id for p in dev}) - {None}


def test_conalas_splits_share_no_pair(conala: Path) -> None:
    train, test = load_pairs(conala), load_pairs(conala, split="test")
    assert not {(p.intent, p.snippet) for p in train} & {(p.intent, p.snippet) for p in test}


@pytest.fixture(scope="module", params=["gpt2-tokenizer", "mistral-tokenizer", "smollm2-135m", "stories260K"])
def tokenizer(assets: Path, request: pytest.FixtureRequest) -> Tokenizer:
    loaded = load_tokenizer(assets / "fixtures" / request.param)
    return loaded if loaded.eos is not None else loaded.with_eos("</s>")


def test_conala_as_ids(conala: Path, tokenizer: Tokenizer) -> None:
    pairs = load_pairs(conala)
    examples = encode_pairs(pairs, tokenizer)
    for pair, example in zip(pairs, examples, strict=True):
        text = f"### Instruction:\n{pair.intent}\n### Response:\n{pair.snippet}"
        assert example.ids == [*tokenizer.encode(text), tokenizer.eos]  # as one text, which is what a model saw before
        assert example.ids[: example.prompt_tokens] == tokenizer.encode(format_prompt(pair.intent))
        assert tokenizer.decode(example.ids[example.prompt_tokens :]) == pair.snippet


SNIPPETS = st.text(st.sampled_from(" \n\t#:ax1\u00e9\u65e5"), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(intent=SNIPPETS.filter(str.strip), snippet=SNIPPETS)
def test_generation_starts_from_the_ids_that_training_saw(tokenizer: Tokenizer, intent: str, snippet: str) -> None:
    (example,) = encode_pairs([Pair(intent, snippet)], tokenizer)
    prompt = tokenizer.encode(format_prompt(intent))
    assert example.ids[: example.prompt_tokens] == prompt
    assert example.ids[-1] == tokenizer.eos
    if not tokenizer.before:  # Llama's tokenizers put a space before a text, so that two parts are not the whole
        assert tokenizer.decode(example.ids) == format_prompt(intent) + snippet


def test_eos_written_in_a_snippet_ends_nothing(tokenizer: Tokenizer) -> None:
    eos = tokenizer.decode([tokenizer.require_eos()], skip_special=False)
    (example,) = encode_pairs([Pair(f"print {eos}", f"print('{eos}')")], tokenizer)
    assert example.ids.index(tokenizer.require_eos()) == len(example.ids) - 1
    assert tokenizer.decode(example.ids[example.prompt_tokens :]) == f"print('{eos}')"


def test_no_eos_is_an_error_that_names_the_remedy(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "fixtures/mistral-tokenizer")
    with pytest.raises(InputError, match=r"no end-of-sequence token .* --eos-token"):
        encode_pairs([Pair("i", "s")], tokenizer)
