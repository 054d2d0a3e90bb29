"""The demo model's corpus: each kind of document from a file written here, and the held-out files."""

import ast
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from minipeft.data.tokens import load_tokenizer
from minipeft.demo import corpus

SOURCE = textwrap.dedent(
    '''
    """A module.

    Double a number:

    >>> double(2)
    4
    """

    def double(x):
        """Return twice x. It is simple."""
        return 2 * x

    class Box:
        def get(self):
            # give back what was
            # put in before
            value = self.value
            return value

            # too short
            pass
    '''
).lstrip()


@pytest.fixture
def found(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(SOURCE)  # the same again: nothing of it is new
    (tmp_path / "broken.py").write_text("def (")
    files = [(f"stdlib/{name}", tmp_path / name) for name in ("a.py", "b.py", "broken.py")]
    return [d for d in corpus.make_documents(files) if d.kind != "reference"]


def of_kind(found, kind):
    return [document.text for document in found if document.kind == kind]


def test_a_function_stands_behind_the_first_sentence_of_its_docstring(found):
    assert of_kind(found, "function") == ["Return twice x.\ndef double(x):\n    return 2 * x\n"]


def test_a_comment_stands_before_the_lines_under_it(found):
    assert of_kind(found, "comment") == ["give back what was put in before\nvalue = self.value\nreturn value\n"]


def test_an_example_stands_behind_its_paragraph(found):
    assert of_kind(found, "example") == ["Double a number:\ndouble(2)\n"]


def test_a_source_is_the_file_and_only_the_standard_librarys(found, tmp_path):
    assert of_kind(found, "source") == [SOURCE]
    others = [("numpy/a.py", tmp_path / "a.py"), ("stdlib/test/a.py", tmp_path / "a.py")]
    assert of_kind(corpus.make_documents(others), "source") == []


def test_a_long_source_is_cut_between_statements_and_loses_nothing(tmp_path):
    text = "".join(f"name_{i} = '{'x' * 80}'\n" for i in range(200))
    pieces = list(corpus.make_source_documents(text, ast.parse(text)))
    assert len(pieces) > 1
    assert "".join(pieces) == text
    for piece in pieces:
        ast.parse(piece)


def test_reference_documents_say_what_a_builtin_does():
    texts = list(corpus.make_reference_documents())
    assert any(t.endswith("\nstr.upper(self, /)\n") and t.startswith("Return a copy") for t in texts)


def test_about_one_file_in_sixty_is_held_out_by_its_name_alone():
    names = [f"stdlib/module_{i}.py" for i in range(6000)]
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert 60 < len(held_out) < 140
    assert [name for name in reversed(names) if corpus.is_held_out(name)] == held_out[::-1]


def test_sources_name_their_package_and_pass_over_what_is_vendored():
    files = corpus.list_source_files(["packaging", "no_such_package"])
    assert {name.split("/")[0] for name, _ in files} == {"stdlib", "packaging"}
    assert not [name for name, _ in files if "site-packages" in name or "_vendor" in name]
    assert len({name for name, _ in files}) == len(files)
    assert all(isinstance(path, Path) and path.is_file() for _, path in files[:50])


def test_pieces_hold_every_token_and_end_texts(tmp_path):
    tokenizer = corpus.train_tokenizer(["for x in y:\n    print(x)\n"] * 3, 300)
    texts = ["for x in y", "print(é)" * 9]
    pieces = corpus.cut_pieces(texts, tokenizer, 8)
    end = tokenizer.token_to_id(corpus.END)
    assert max(map(len, pieces)) <= 8
    joined = [token for piece in pieces for token in piece]
    assert [i for i, token in enumerate(joined) if token == end][-1] == len(joined) - 1
    assert tokenizer.decode(joined, skip_special_tokens=True) == "".join(texts)
    corpus.save_tokenizer(tokenizer, tmp_path, 8)
    assert load_tokenizer(tmp_path).encode(texts[1]) == tokenizer.encode(texts[1]).ids
    assert load_tokenizer(tmp_path).eos == end
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == tokenizer.to_str()


def test_no_pair_of_the_demo_is_in_the_corpus():
    """Sources are the standard library's and other packages': never minipeft's own, where the pairs lie."""
    assert "minipeft" not in corpus.PACKAGES
    assert not [path for _, path in corpus.list_source_files() if path.is_relative_to(Path(corpus.__file__).parents[1])]
