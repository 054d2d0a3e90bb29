"""Run every snippet of the demo's pairs, each in an empty folder of its own; the package itself runs nothing it holds.

python tests/demo/run_snippets.py     # exit status 1, and a line each, for those that do not end as they should
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from minipeft.demo.make_pairs import HERE, Pair, make_pairs


def run(pairs: list[Pair]) -> Iterator[tuple[Pair, str]]:
    """Run each snippet in an empty folder of its own; yields those that did not end as they should, and how."""
    for pair in pairs:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            os.mkdir("folder")
            Path("notes.txt").write_text("one\ntwo\n")
            ended = None
            try:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                    exec(compile(pair.program, "<pair>", "exec"), {"__name__": "pair"})
            except BaseException as error:  # whatever a snippet may raise is its outcome
                ended = type(error).__name__
            os.chdir(HERE)
        if ended != pair.raises:
            yield pair, str(ended)


if __name__ == "__main__":
    bad = list(run(make_pairs()))
    for pair, ended in bad:
        print(f"{pair.number} {pair.snippet!r} ended with {ended}", file=sys.stderr)
    sys.exit(bool(bad))
