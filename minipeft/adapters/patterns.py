"""Regular expressions from configs and downloaded files, matched so that no pattern can hang the process.

Python's matcher backtracks: "(a+)+$" on a long path takes years, and cannot be interrupted from another thread. A
pattern that could backtrack is therefore matched in a process of its own, which is killed after DEADLINE seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

from minipeft.errors import InputError

T = TypeVar("T")
HARMLESS = re.compile(r"[\w.\\^$-]*")  # a pattern of these characters alone is matched in linear time
DEADLINE = 2.0  # seconds for one pattern over all paths of a model, the start of its process included
TRY = "import json,re,sys; p, names = json.load(sys.stdin); print(json.dumps([n for n in names if re.fullmatch(p, n)]))"


def match_paths(pattern: str, paths: Sequence[str], where: str, *, suffix: bool = False) -> list[str]:
    """The paths that the regular expression matches whole; with `suffix`, those that end, from a dot on, in a match.

    Raises:
        InputError: the pattern is invalid, or takes longer than DEADLINE.
    """
    whole = rf"(.*\.)?({pattern})" if suffix else pattern
    try:
        compiled = re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}", where=where) from error
    if HARMLESS.fullmatch(pattern):
        return [path for path in paths if compiled.fullmatch(path)]
    command = [sys.executable, "-I", "-c", TRY]
    given = json.dumps([whole, list(paths)])
    try:
        tried = subprocess.run(command, input=given, capture_output=True, text=True, timeout=DEADLINE, check=True)
    except subprocess.TimeoutExpired as error:
        hint = "Avoid repeated groups that contain repetitions"
        raise InputError(f"{pattern!r} took longer than {DEADLINE} s to match", where=where, hint=hint) from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{pattern!r} cannot be matched: {error.stderr.strip()[-200:]}", where=where) from error
    found: list[str] = json.loads(tried.stdout)
    return found


def values_by_path(patterns: Mapping[str, T], paths: Sequence[str], where: str) -> dict[str, T]:
    """The value for each path that a pattern matches: HF PEFT's rank_pattern and alpha_pattern.

    A key is a regular expression for the end of a path, from a dot on ("q_proj", "0.attn.c_attn", "^model.layers.1.*").
    Where several match, the first counts.

    Raises:
        InputError: a key matches none of `paths`.
    """
    values: dict[str, T] = {}
    for key, value in patterns.items():
        found = match_paths(key, paths, where, suffix=True)
        if not found:
            raise InputError(f"{key!r} matches none of the targets, such as {paths[0]!r}", where=where)
        values = {**dict.fromkeys(found, value), **values}
    return values
