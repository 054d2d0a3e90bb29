"""Ids and texts against transformers, special tokens, and the errors of damaged tokenizer files."""

import copy
import ctypes
import gc
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError

FIXTURES = ["gpt2-tokenizer", "mistral-tokenizer", "smollm2-135m", "stories260K"]


@pytest.fixture(scope="module")
def texts(assets: Path) -> list[str]:
    """Every intent, rewritten intent and snippet of CoNaLa's 2,879 pairs."""
    files = sorted((assets / "data/conala").iterdir())
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 2879
    return [row[name] for row in rows for name in ("intent", "rewritten_intent", "snippet") if row[name]]


def peer(folder: Path) -> Any:
    """The same tokenizer in transformers."""
    if (folder / "vocab.json").exists():
        return transformers.GPT2Tokenizer.from_pretrained(folder)
    if not (folder / "tokenizer_config.json").exists():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FIXTURES)
def test_ids_and_texts_equal_transformers(assets: Path, texts: list[str], name: str) -> None:
    ours, hf = load_tokenizer(assets / "fixtures" / name), peer(assets / "fixtures" / name)
    ids = ours.encode_all(texts)
    assert ids == hf(texts)["input_ids"]
    decoded = [hf.decode(i, skip_special_tokens=True, clean_up_tokenization_spaces=False) for i in ids]
    assert [ours.decode(i) for i in ids] == decoded == texts
    assert ours.size == len(hf)
    assert (ours.bos, ours.eos, ours.pad) == (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id)
    assert ours.encode_all(texts[:9]) == [ours.encode(text) for text in texts[:9]]


@pytest.fixture(scope="module")
def bytewise(assets: Path) -> Tokenizer:
    return load_tokenizer(assets / "fixtures/gpt2-tokenizer")


@settings(derandomize=True, deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(bytewise: Tokenizer, text: str) -> None:
    assert bytewise.decode(bytewise.encode(text)) == text


@pytest.fixture
def tiny(assets: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer.json (stories260K's) that a test may change."""
    shutil.copy(assets / "fixtures/stories260K/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.json").chmod(0o644)
    return tmp_path


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A folder with vocab.json and merges.txt: 256 bytes, three merges and GPT-2's special token."""
    signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: number for number, sign in enumerate([*signs, "he", "ll", "hell", "<|endoftext|>"])}
    write(tmp_path / "vocab.json", vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n", encoding="utf-8")
    return tmp_path


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("name", ["mistral-tokenizer", "smollm2-135m", "stories260K"])
def test_the_name_of_a_special_token_is_text(assets: Path, name: str) -> None:
    tokenizer = load_tokenizer(assets / "fixtures" / name)
    text = "print('</s>') <s> <|im_end|><|endoftext|>"
    ids = tokenizer.encode(text)
    special = {tokenizer.backend.token_to_id(token) for token in ("<s>", "</s>", "<|im_end|>", "<|endoftext|>")}
    assert not special & set(ids[len(tokenizer.before) :])
    assert tokenizer.decode(ids) == text


BOS_SAID = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": False}, {"bos_token": None}]


@pytest.mark.parametrize("given", BOS_SAID)
def test_the_post_processor_puts_bos_as_in_transformers(tiny: Path, given: dict[str, Any]) -> None:
    write(tiny / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | given)
    for processor in (json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))["post_processor"], None):
        change(tiny, post_processor=processor)
        ours, hf = load_tokenizer(tiny), peer(tiny)
        assert ours.encode("Once upon") == hf("Once upon")["input_ids"]
        assert ours.encode("Once upon", bos=False) == hf("Once upon", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("given", [*BOS_SAID[:-1], {"add_prefix_space": True}])
def test_without_tokenizer_json_the_config_puts_bos_as_in_transformers(gpt2: Path, given: dict[str, Any]) -> None:
    write(gpt2 / "tokenizer_config.json", given)
    assert load_tokenizer(gpt2).encode("hell") == peer(gpt2)("hell")["input_ids"]


def test_an_eos_that_the_tokenizer_appends_is_left_to_the_training_text(tiny: Path) -> None:
    write(tiny / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    change(tiny, post_processor=json.loads(template.__getstate__()))
    assert [*load_tokenizer(tiny).encode("Once"), 2] == peer(tiny)("Once")["input_ids"]


def test_codegpts_three_files(gpt2: Path) -> None:
    write(gpt2 / "added_tokens.json", {"<s>": 260, "</s>": 261, "<pad>": 262})
    write(
        gpt2 / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    )
    ours, hf = load_tokenizer(gpt2), peer(gpt2)
    assert (ours.bos, ours.eos, ours.pad, ours.size) == (260, 261, 262, 263)
    for text in ("hello hell", "  x = {'ü': 1}\n", "日本"):
        assert ours.encode(text) == hf(text)["input_ids"]
    assert ours.decode([*ours.encode("hello"), 261, 262]) == "hello"
    assert ours.decode([261], skip_special=False) == "</s>"


def test_gpt2_without_settings_ends_with_its_own_token(gpt2: Path) -> None:
    write(gpt2 / "config.json", {"eos_token_id": 50256})  # copied from GPT-2, as CodeGPT's is; not in this vocabulary
    assert load_tokenizer(gpt2).eos == 259


def test_a_merges_file_with_windows_line_ends_is_the_same(gpt2: Path) -> None:
    want = load_tokenizer(gpt2).encode("hello")
    (gpt2 / "merges.txt").write_bytes((gpt2 / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(gpt2).encode("hello") == want


def test_special_ids_come_from_the_first_file_that_says(tiny: Path) -> None:
    assert load_tokenizer(tiny).eos is None
    write(tiny / "config.json", {"eos_token_id": [2, 5], "bos_token_id": 1, "pad_token_id": 9999})
    tokenizer = load_tokenizer(tiny)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, None)
    write(tiny / "special_tokens_map.json", {"eos_token": "<unk>"})
    assert load_tokenizer(tiny).eos == 0
    write(tiny / "tokenizer_config.json", {"eos_token": {"content": "<s>"}})
    assert load_tokenizer(tiny).eos == 1


def test_eos_can_be_named_where_no_file_does(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    with pytest.raises(InputError, match=r"no end-of-sequence token .*--eos-token"):
        tokenizer.require_eos()
    named = tokenizer.with_eos("</s>")
    assert (named.require_eos(), tokenizer.eos) == (2, None)
    assert named.encode("a </s>") == tokenizer.encode("a </s>")
    with pytest.raises(InputError, match="'<end>' is not in the vocabulary"):
        tokenizer.with_eos("<end>")


def test_padding_and_truncation_in_the_file_have_no_effect(tiny: Path) -> None:
    want = load_tokenizer(tiny).encode("Once upon a time")
    padding = {
        "strategy": {"Fixed": 30_000_000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    for length, stride in ((1, 0), (0, 0), (1, 5)):
        truncation = {"max_length": length, "stride": stride, "strategy": "LongestFirst", "direction": "Right"}
        change(tiny, padding=padding, truncation=truncation)
        assert load_tokenizer(tiny).encode("Once upon a time") == want


def test_a_chat_template_is_never_rendered(tiny: Path) -> None:
    want = load_tokenizer(tiny).encode("Once")
    write(tiny / "tokenizer_config.json", {"chat_template": "{{ cycler.__init__.__globals__.os.system('false') }}"})
    assert load_tokenizer(tiny).encode("Once") == want


def test_a_tokenizer_of_another_model_is_refused(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.check_fits(512)
    with pytest.raises(InputError, match=r"tokenizer.json: token '.*' has id 511, but the model in M has 300 tokens"):
        tokenizer.check_fits(300, "M")


def test_random_merges_are_refused(assets: Path, tmp_path: Path) -> None:
    """With BPE dropout each call would give other ids, and two runs of one command would differ."""
    spec = json.loads((assets / "fixtures" / "mistral-tokenizer" / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.3
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"tokenizer\.json: model\.dropout: 0\.3: merges would be left out at random"):
        load_tokenizer(tmp_path)


def test_fingerprint_tells_what_changes_the_ids(tiny: Path) -> None:
    first = load_tokenizer(tiny).fingerprint
    assert load_tokenizer(tiny).fingerprint == first
    assert load_tokenizer(tiny).with_eos("</s>").fingerprint != first
    write(tiny / "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": False})
    assert load_tokenizer(tiny).fingerprint != first


def test_a_text_that_is_no_text_is_named(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"text 2: holds a lone surrogate, '\\ud800'"):
        load_tokenizer(tiny).encode_all(["fine", "x\ud800"])


def change(folder: Path, **entries: Any) -> dict[str, Any]:
    """Put entries into tokenizer.json; a dotted name (model__vocab) reaches inside."""
    spec: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for name, value in entries.items():
        *path, last = name.split("__")
        place = spec
        for part in path:
            place = place[part]
        place[last] = value(place[last]) if callable(value) else value
    write(folder / "tokenizer.json", spec)
    return spec


def added(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def split_on(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 2_000}
UNKNOWN: dict[str, Any] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
           "pair": [], "special_tokens": {}}  # fmt: skip
BEYOND = {**UNKNOWN, "single": [*UNKNOWN["single"], {"Sequence": {"id": "A", "type_id": 0}}],
          "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
          "special_tokens": {"<x>": {"id": "<x>", "ids": [9999], "tokens": ["<x>"]}}}  # fmt: skip
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "T01 missing": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json, and no vocab.json with merges.txt"),
    "T02 truncated": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json: not valid JSON: line 1 column"),
    "T03 id beyond": (lambda f: change(f, added_tokens=lambda a: [*a, added(5000, "hello")]), "'hello' has id 5000"),
    "T04 two tokens, one id": (lambda f: change(f, model__vocab=lambda v: v | {"zz": 7}), "ids not unique: "),
    "T05 regex": (lambda f: change(f, pre_tokenizer=split_on("(a|aa)+$")), "text 2: the tokenizer fails"),
    "T07 text grows": (lambda f: change(f, normalizer=GROWS), "its rules make the text grow"),
    "T08 unknown type": (lambda f: change(f, model__type="Magic"), "tokenizer.json: the tokenizer fails"),
    "T09 merge outside": (lambda f: change(f, model__merges=[["q", "qq"]]), "tokenizer.json: the tokenizer fails"),
    "T10 three parts": (lambda f: change(f, model__merges=["a b c"]), "tokenizer.json: the tokenizer fails"),
    "T13 empty": (lambda f: change(f, model__vocab={}), "tokenizer.json: model: vocabulary is empty"),
    "T14 collision": (lambda f: change(f, added_tokens=lambda a: [*a, added(7, "new")]), "'new' has id 7, which is"),
    "T16 unknown special": (lambda f: change(f, post_processor=UNKNOWN), "tokenizer.json: "),
    "T17 id -1": (lambda f: change(f, model__vocab=lambda v: v | {"zz": -1}), "token 'zz' has id -1"),
    "vocab is text": (lambda f: change(f, model__vocab="abc"), "vocab: must be an object of token: id, is text"),
    "text doubles thirty times": (
        lambda f: change(f, normalizer={"type": "Sequence", "normalizers": [{**GROWS, "content": "aa"}] * 30}),
        "normalizer: its rules may make a text 2e+14 times as long",
    ),
    "answer doubles thirty times": (
        lambda f: change(f, decoder={"type": "Sequence", "decoders": [{**GROWS, "content": "aa"}] * 30}),
        "decoder: its rules may make a text 2e+14 times as long",
    ),
    "post-processor beyond": (
        lambda f: change(f, post_processor=BEYOND),
        "post_processor: puts id 9999 before a text, but the vocabulary ends at",
    ),
    "list at top": (lambda f: write(f / "tokenizer.json", []), "must hold a JSON object, but holds a list"),
    "eos is a number": (lambda f: write(f / "tokenizer_config.json", {"eos_token": 7}), "eos_token: must be text"),
    "eos unknown": (lambda f: write(f / "special_tokens_map.json", {"eos_token": "<e>"}), "'<e>' is not in the voc"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_tokenizer_is_one_line(tiny: Path, case: str) -> None:
    spoil, said = CASES[case]
    spoil(tiny)
    with pytest.raises(InputError) as error:
        load_tokenizer(tiny).encode_all(["fine", "a" * 60 + "b"])
    assert said in str(error.value)
    assert str(tiny) in str(error.value)
    assert "\n" not in str(error.value)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


LINES: dict[str, tuple[str, bytes, str]] = {
    "no header": ("merges.txt", b"h e\nl l\n", "line 1 is 'h e', not '#version: ...'"),
    "three parts": ("merges.txt", b"#version: 0.2\nh e\nh e l\n", "line 3: 'h e l' is not two tokens"),
    "not in the vocabulary": ("merges.txt", b"#version: 0.2\nh e\nx y\n", "line 3: 'xy' is not in vocab.json"),
    "CR alone": ("merges.txt", b"#version: 0.2\rh e\rhe l\r", "merges.txt: line 1 ends in CR alone"),
    "CR in the middle": ("merges.txt", b"#version: 0.2\nh e\rhe l\n", "merges.txt: line 2 ends in CR alone"),
    "wrong encoding": ("merges.txt", b"#version: 0.2\nh \xe9\n", "merges.txt: not UTF-8 at byte 16"),
    "empty": ("vocab.json", b"{}", "vocab.json: vocabulary is empty"),
    "one id": ("vocab.json", b'{"a": 0, "b": 0}', "ids not unique: 'a' and 'b' both have 0"),
    "one token": ("vocab.json", b'{"a": 0, "a": 1}', "key 'a' given twice"),
    "id is text": ("vocab.json", b'{"a": "0"}', "token 'a' has id '0', not a number from 0"),
    "added in a hole": ("added_tokens.json", b'{"<x>": 300}', "token '<x>' has id 300, but vocab.json leaves it 260"),
    "no bos": ("tokenizer_config.json", b'{"bos_token": "<b>", "add_bos_token": true}', "add_bos_token: is true, but"),
}


@pytest.mark.parametrize("case", LINES)
def test_damaged_gpt2_files_are_one_line(gpt2: Path, case: str) -> None:
    name, content, said = LINES[case]
    (gpt2 / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(gpt2)
    assert said in str(error.value)
    assert str(gpt2) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_link_that_leaves_the_folder_is_not_followed(tmp_path, assets, name):
    inside, outside = tmp_path / "model", tmp_path / "secret.json"
    inside.mkdir()
    source = assets / "fixtures/stories260K"
    for other in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (inside / other).write_bytes((source / other).read_bytes())
    outside.write_bytes((source / name).read_bytes())
    (inside / name).unlink()
    (inside / name).symlink_to(outside)
    with pytest.raises(InputError, match="is a link that leaves the model folder"):
        load_tokenizer(inside)


def test_a_character_without_a_token_is_refused_not_left_out(gpt2: Path) -> None:
    """The library leaves out a byte that a byte-level vocabulary lacks: "a~b" would be trained on as "ab"."""
    vocab = json.loads((gpt2 / "vocab.json").read_text())
    assert load_tokenizer(gpt2).decode(load_tokenizer(gpt2).encode("a~b", bos=False)) == "a~b"
    number = vocab.pop("~")
    write(gpt2 / "vocab.json", {**vocab, "<unused>": number})
    tokenizer = load_tokenizer(gpt2)
    assert tokenizer.decode(tokenizer.encode("ab é", bos=False)) == "ab é"
    with pytest.raises(InputError, match=r"vocab.json: text 2: holds '~', for which the vocabulary has no token"):
        tokenizer.encode_all(["ab", "a~b"])


@pytest.mark.parametrize("token", ["<b:s>", "<b s>", ":", "$A", "a:0 $B:0"])
def test_a_bos_token_may_hold_what_a_template_reads(gpt2: Path, token: str) -> None:
    vocab = json.loads((gpt2 / "vocab.json").read_text())
    number = vocab.setdefault(token, len(vocab))
    write(gpt2 / "vocab.json", vocab)
    write(gpt2 / "tokenizer_config.json", {"bos_token": token, "eos_token": token, "add_bos_token": True})
    tokenizer = load_tokenizer(gpt2)
    assert tokenizer.encode("ab")[0] == number == tokenizer.bos
    assert tokenizer.encode("ab")[1:] == tokenizer.encode("ab", bos=False)


def bytes_in_use() -> int:
    """The bytes that malloc has handed out, by glibc's mallinfo2: ten size_t, the 5th hblkhd, the 8th uordblks."""
    gc.collect()
    count = ctypes.CDLL("libc.so.6").mallinfo2
    count.restype = type("Counts", (ctypes.Structure,), {"_fields_": [(f"n{n}", ctypes.c_size_t) for n in range(10)]})
    counts = count()
    return int(counts.n4 + counts.n7)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc from 2.33 on counts its memory")
@pytest.mark.parametrize("use", ["encode", "with_eos", "copy", "pieces"])
def test_a_dropped_tokenizer_is_freed(use: str) -> None:
    """The library keeps the words of a BPE by thread: 80 KB for these texts, for each tokenizer, for ever.

    Its threads' buffers grow in the first rounds, so the round that grows least decides.
    """
    texts = [f"value_{n} = table_{n * 7}.mean({n}) " * 4 for n in range(200)]

    def load_and_encode() -> None:
        tokenizer = load_tokenizer("demo")
        if use == "pieces":
            end = tokenizer.backend.id_to_token(tokenizer.require_eos())
            tokenizer.encode_pieces([[(text, False), (end, True)] for text in texts])
        else:
            made = {"with_eos": lambda: tokenizer.with_eos("<|endoftext|>"), "copy": lambda: copy.deepcopy(tokenizer)}
            made.get(use, lambda: tokenizer)().encode_all(texts)

    held = []
    for _ in range(5):
        load_and_encode()
        held.append(bytes_in_use())
    grown = [after - before for before, after in pairwise(held)]
    assert min(grown[1:]) < 60_000, grown
