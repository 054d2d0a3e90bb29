"""Comments and docstrings: removed as the codebleu package does, byte for byte, and as Python's parser defines them."""

import ast
import random
import re
import sys

import pytest

from minipeft.metrics.comments import drop_as_package, drop_truly


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="the package's rule rests on tokenize.py, another one from 3.12"
)
def test_the_package_leaves_the_same_text(package, snippets, mutate):
    from codebleu.parser import remove_comments_and_docstrings

    def expected(text):
        try:
            return remove_comments_and_docstrings(text, "python")
        except Exception:  # as the package does
            return text

    chance = random.Random(6)
    signs = ["'", '"', "'''", '"""', "#", "\\\n", "\\\r\n", "\\", "\n", "\r", "\t", "\f", " ", "$", "(", ")", "rb", "x"]
    texts = [*snippets, *(mutate(chance.choice(snippets), chance) for _ in range(1500))]
    texts += ["".join(chance.choices(signs, k=chance.randint(1, 25))) for _ in range(3000)]
    for text in texts:
        assert drop_as_package(text) == expected(text), repr(text)


def without_docstrings(code: str) -> str:
    """The text of Python's own tree, which holds no comments, without the docstrings that `ast` finds."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            more = len(node.body) > 1 or not isinstance(node, ast.Module)
            if ast.get_docstring(node, clean=False) is not None and more:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def squeeze(code: str) -> str:
    """Code without the blank lines inside its strings: those go too, and no part of a score sees it."""
    return re.sub(r"(\\n)+", r"\\n", code)


NOTED = '''"""A module."""
# first
import re  # why

class A:  # a class
    # before
    r"""Doc.""" """More."""

    #: after
    def f(self):
        \'\'\'Doc
        of f.\'\'\'
        'a string, no docstring'
        ' '.join(self)  # "quoted"
        return "# no comment"

    async def g(self):
        b'no docstring'
        f'{self}'


if h:
    'no docstring'
'''


def test_python_sees_the_same_program_without_notes(snippets):
    checked = 0
    for text in [NOTED, *snippets]:
        try:
            expected = without_docstrings(text)
        except (SyntaxError, ValueError):
            continue
        left = drop_truly(text)
        if left.endswith(":"):  # a body that was a docstring and nothing else
            left += " pass"
        assert squeeze(ast.unparse(ast.parse(left))) == squeeze(expected), text
        checked += 1
    assert checked > 120


def test_a_text_that_is_one_string_is_an_answer():
    assert drop_truly("'x'  # a comment") == "'x'  "
    assert drop_truly("'x'\ny = 1") == "y = 1"


def test_notes_go_from_broken_and_from_odd_texts():
    assert drop_truly("f(a # b\n") == "f(a "
    assert drop_truly("é = '#'  # ü\nclass Ü:\n  'dö'\n  x = 1") == "é = '#'  \nclass Ü:\n  x = 1"
    assert drop_truly("def f(): 'd'; return 1") == "def f(): 'd'; return 1"
    assert drop_truly("a = b\\\n\nc = d") == "a = b\\\n\nc = d"
    assert drop_truly("\ud800 # x") == "? "
