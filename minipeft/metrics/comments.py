"""Remove comments and docstrings from code: as the `codebleu` package does, and correctly.

`drop_as_package`: the package (0.4.0 to 0.7.0) reads Python's token stream and drops comments, but also *every* string
that begins a line of code: `' '.join(x)` becomes `.join(x)`. Tabs become single spaces, continued lines are joined,
blank lines are removed, and a text that does not tokenize (an open bracket, a wrong dedent) stays as it is.

`drop_truly` finds comments and docstrings in the syntax tree and removes them, with blank lines (no score depends on
blank lines, but more texts are then equal, and equal texts are analysed once).
"""

import io
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import tree_sitter

from minipeft.metrics.grammar import find

# The token stream is that of Python 3.11's tokenize.py (later versions read f-strings otherwise and refuse more), as
# far as it matters here: a stretch of plain text (names, numbers, operators, brackets) is one token. Time is linear in
# the length of a line, where tokenize.py is quadratic for a million blanks before a `$`.
BREAKABLE = re.compile(r"[#'\"\\\t\f\r]")  # what the package may drop or change
# What drop_truly looks for in a tree, as a query of tree-sitter.
NOTES = """
(comment) @comment
(module) @body
(class_definition body: (block) @body)
(function_definition body: (block) @body)
"""
QUOTE = re.compile(r"['\"]")
BODY = re.compile(r"\A\W*[rRuU]?['\"]|\b(?:def|class)\b")
SPACE = re.compile(r"[ \f\t]*")
PLAIN = re.compile(r"(?:[\w%&*+,\-./:;<=>@^|~()\[\]{}]|!=)+")
PREFIXED = re.compile(r"(?:br|rb|fr|rf|[bfru])?('''|\"\"\"|'|\")", re.IGNORECASE | re.ASCII)
COMMENT = re.compile(r"#[^\r\n]*")
LINE_END = re.compile(r"\r?\n")
CONTINUED = re.compile(r"\\\r?\n")
ON_LINE = {  # the inside of a string, as far as this line goes
    "'": re.compile(r"[^\n'\\]*(?:\\(?!\r?\n).[^\n'\\]*)*"),
    '"': re.compile(r'[^\n"\\]*(?:\\(?!\r?\n).[^\n"\\]*)*'),
}
TO_END = {  # the inside of a string that may go on over lines, with its end
    "'": re.compile(r"[^'\\]*(?:\\.[^'\\]*)*'"),
    '"': re.compile(r'[^"\\]*(?:\\.[^"\\]*)*"'),
    "'''": re.compile(r"[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"),
    '"""': re.compile(r'[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'),
}


class NoTokens(Exception):
    """Python's tokenizer rejects the text."""


@dataclass(slots=True)
class Token:
    """A piece of code; `kind` is one of indent, dedent, plain, string, comment, break (inside brackets) and end."""

    kind: str
    text: str
    line: int
    column: int
    end_line: int
    end_column: int


def drop_as_package(code: str) -> str:
    """Remove what `remove_comments_and_docstrings` of the codebleu package removes, with the damage that it does."""
    if not BREAKABLE.search(code) and all(map(str.strip, code.split("\n"))):
        return code  # nothing to drop
    pieces: list[str] = []
    previous, line, column = "indent", 0, 0
    try:
        for token in _tokens(code):
            if token.line > line:
                column = 0
            pieces.append(" " * (token.column - column))
            at_start = previous in ("indent", "end") or token.column == 0
            if token.kind != "comment" and not (token.kind == "string" and at_start):
                pieces.append(token.text)
            previous, line, column = token.kind, token.end_line, token.end_column
    except NoTokens:
        return code
    return "\n".join(text for text in "".join(pieces).split("\n") if text.strip())


def may_hold_notes(code: str) -> bool:
    """Whether the text may hold comments or docstrings; decided without parsing, true if in doubt."""
    return "#" in code or (QUOTE.search(code) is not None and BODY.search(code) is not None)


def drop_truly(code: str) -> str:
    """Remove comments, blank lines, and the strings that are the docstring of the text, of a class or of a function.

    A text that consists of one string stays: the string is the answer, not a docstring.
    """
    if may_hold_notes(code):
        code = _cut_notes(code)
    lines = code.split("\n")
    if all(map(str.strip, lines)):
        return code
    # A blank line after a backslash is the rest of its line: it ends the statement.
    return "\n".join(line for before, line in zip(["", *lines], lines) if line.strip() or before.endswith("\\"))


def _cut_notes(code: str) -> str:
    data = code.encode("utf-8", "replace")
    found = find(NOTES, data)
    docstrings = (_docstring(body) for body in found.get("body", ()))
    notes = [*found.get("comment", ()), *(string for string in docstrings if string is not None)]
    pieces, place = [], 0
    for note in sorted(notes, key=lambda node: node.start_byte):
        pieces.append(data[place : note.start_byte])
        place = note.end_byte
    return b"".join([*pieces, data[place:]]).decode("utf-8", "replace")


def _docstring(body: tree_sitter.Node) -> tree_sitter.Node | None:
    """The string that is all of a body's first statement: text (not bytes, no f-string), and alone on its line."""
    first = next((child for child in body.children if child.type != "comment"), None)
    if first is None or first.type != "expression_statement" or len(first.children) != 1:
        return None
    string = first.children[0]
    parts = string.named_children if string.type == "concatenated_string" else [string]
    if not all(part.type == "string" and not _prefix(part) & set(b"bf") for part in parts):
        return None
    after = first.next_sibling
    while body.type == "module" and after is not None and after.type == "comment":
        after = after.next_sibling
    if after is None:
        return string if body.type == "block" else None
    return None if after.type == ";" else string


def _prefix(string: tree_sitter.Node) -> set[int]:
    """A string's prefix letters and opening quotes."""
    return set((string.children[0].text or b"").lower()) if string.children else set()


def _tokens(code: str) -> Iterator[Token]:
    """Read the token stream line by line, as tokenize.py does.

    Raises: NoTokens for a dedent that matches no outer block, and for a text that ends inside a string or a bracket.
    """
    reader, indents, text = Reader(), [0], ""
    for text in io.StringIO(code):  # lines end at a line feed only
        reader.line += 1
        place = 0
        if reader.opened is not None:
            place = yield from reader.go_on(text)
        elif reader.level == 0 and not reader.continued:
            place, column = _measure_indent(text)
            if place == len(text):  # only the last line can be blank and lack a line feed
                text = ""
                break
            if text[place] in "#\r\n":
                end = len(text.rstrip("\r\n")) if text[place] == "#" else place
                if end > place:
                    yield reader.token("comment", text, place, end)
                yield reader.token("break", text, end, len(text))
                continue
            if column > indents[-1]:
                indents.append(column)
                yield reader.token("indent", text, 0, place)
            while column < indents[-1]:
                if column not in indents:
                    raise NoTokens
                indents.pop()
                yield reader.token("dedent", text, place, place)
        reader.continued = False
        yield from reader.read(text, place)
    if reader.opened is not None or reader.level != 0 or reader.continued:
        raise NoTokens
    if text and text[-1] not in "\r\n" and not text.strip().startswith("#"):
        yield reader.token("end", text, len(text), len(text))


def _measure_indent(text: str) -> tuple[int, int]:
    """The index of the line's first non-blank character, and its column with tabs to multiples of 8."""
    column = 0
    for place, sign in enumerate(text):
        if sign == " ":
            column += 1
        elif sign == "\t":
            column = (column // 8 + 1) * 8
        elif sign == "\f":
            column = 0
        else:
            return place, column
    return len(text), column


@dataclass(slots=True)
class Reader:
    """The tokenizer's state between lines."""

    line: int = 0
    level: int = 0  # of brackets; negative after an unmatched closing bracket
    continued: bool = False  # the last line ended with a backslash
    opened: Token | None = None  # a string that continues
    quote: str = ""  # the quote that ends it
    lines_join: bool = False  # it continues after a backslash only; tokenize.py does not reset this after a failure

    def token(self, kind: str, text: str, start: int, end: int) -> Token:
        return Token(kind, text[start:end], self.line, start, self.line, end)

    def read(self, text: str, place: int) -> Iterator[Token]:
        """The tokens of one line from `place` on."""
        if place < len(text) and not BREAKABLE.search(text, place):  # one token suffices
            end = len(text) - text.endswith("\n")
            self._count_brackets(text[place:end])
            yield self.token("plain", text, place, end)
            if end < len(text):
                yield self.token("break" if self.level > 0 else "end", text, end, len(text))
            return
        endless: set[str] = set()  # quotes that no string of this line begins with: its end was searched for
        while place < len(text):
            start = SPACE.match(text, place).end()  # type: ignore[union-attr]
            if found := PREFIXED.match(text, start):
                quote = found[1]
                if len(quote) == 3:
                    inside = TO_END[quote].match(text, found.end())
                    if inside is None:
                        self._open(text, start, quote)
                        return
                    yield self.token("string", text, start, inside.end())
                    place = inside.end()
                    continue
                if quote not in endless:
                    inside = ON_LINE[quote].match(text, found.end())
                    assert inside is not None
                    if text.startswith(quote, inside.end()):
                        place = inside.end() + 1
                        yield self.token("string", text, start, place)
                        continue
                    if CONTINUED.match(text, inside.end()):
                        self._open(text, start, quote)
                        return
                    endless.add(quote)
            if found := PLAIN.match(text, start):
                self._count_brackets(found[0])
                yield self.token("plain", text, start, found.end())
            elif found := COMMENT.match(text, start):
                yield self.token("comment", text, start, found.end())
            elif found := LINE_END.match(text, start):
                yield self.token("break" if self.level > 0 else "end", text, start, found.end())
            elif found := CONTINUED.match(text, start):
                self.continued = True
            elif start < len(text):  # an invalid character: it is kept, with the blanks before it
                yield self.token("plain", text, place, start + 1)
                place = start + 1
                continue
            place = found.end() if found else start

    def go_on(self, text: str) -> Generator[Token, None, int]:
        """Continue the open string; returns the index in this line at which it ends."""
        opened = self.opened
        assert opened is not None
        opened.text += text
        opened.end_line, opened.end_column = self.line, len(text)
        if end := TO_END[self.quote].match(text):
            opened.text = opened.text[: len(opened.text) - len(text) + end.end()]
            opened.end_column = end.end()
            self.lines_join = False
        elif not self.lines_join or CONTINUED.search(text):
            return len(text)
        else:
            opened.kind = "plain"  # its line ends without a backslash: no string after all
        self.opened = None
        yield opened
        return opened.end_column

    def _count_brackets(self, text: str) -> None:
        self.level += sum(map(text.count, "([{")) - sum(map(text.count, ")]}"))

    def _open(self, text: str, start: int, quote: str) -> None:
        self.opened, self.quote = self.token("string", text, start, len(text)), quote
        self.lines_join = self.lines_join or len(quote) == 1
