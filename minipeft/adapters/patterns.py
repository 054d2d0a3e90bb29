"""Matching of regular expressions from configs and downloaded files, with a time limit.

Python's matcher backtracks: "(a+)+$" on a long path takes years, and cannot be interrupted from another thread. A
pattern that could backtrack is therefore matched in a process of its own, which is killed after DEADLINE seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from minipeft.errors import InputError, format_value

T = TypeVar("T")
HARMLESS = re.compile(r"[\w.\\^$-]*")  # a pattern of these characters alone is matched in linear time
DEADLINE = 2.0  # seconds for one pattern over all paths of a model, the start of its process included
TRY = """import json, re, sys
patterns, names = json.load(sys.stdin)
for p in patterns:
    print(json.dumps([n for n in names if re.fullmatch(p, n)]), flush=True)"""


def match_paths(pattern: str, paths: Sequence[str], where: str, *, suffix: bool = False) -> list[str]:
    """The paths that the regular expression matches fully; with `suffix` it may match the end of a path, from a dot on.

    Raises:
        InputError: the pattern is invalid, or takes longer than DEADLINE.
    """
    return match_all([pattern], paths, where, suffix=suffix)[pattern]


def match_all(
    patterns: Collection[str], paths: Sequence[str], where: str, *, suffix: bool = False
) -> dict[str, list[str]]:
    """`match_paths` for several patterns, in one process: a file may hold thousands.

    Raises:
        InputError: a pattern is invalid, or all together take longer than DEADLINE; names the pattern.
    """
    wholes = {pattern: rf"(.*\.)?({pattern})" if suffix else pattern for pattern in patterns}
    found: dict[str, list[str]] = {}
    for pattern, whole in wholes.items():
        try:
            compiled = re.compile(whole)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{format_value(pattern)} is not a regular expression: {error}", where=where) from error
        if HARMLESS.fullmatch(pattern):
            found[pattern] = [path for path in paths if compiled.fullmatch(path)]
    others = [pattern for pattern in wholes if pattern not in found]
    tried = try_patterns(others, [wholes[pattern] for pattern in others], paths, where) if others else []
    return found | dict(zip(others, tried))


def try_patterns(patterns: list[str], wholes: list[str], paths: Sequence[str], where: str) -> list[list[str]]:
    """The paths that each of `wholes` matches, found in a process that is killed after DEADLINE."""
    command = [sys.executable, "-I", "-c", TRY]
    given = json.dumps([wholes, list(paths)])
    try:
        tried = subprocess.run(command, input=given, capture_output=True, text=True, timeout=DEADLINE, check=True)
    except subprocess.TimeoutExpired as error:
        pattern = patterns[min((error.stdout or b"").count(b"\n"), len(patterns) - 1)]  # one line for each that ended
        hint = "Avoid repeated groups that contain repetitions"
        raise InputError(
            f"{format_value(pattern)} took longer than {DEADLINE} s to match", where=where, hint=hint
        ) from error
    except subprocess.CalledProcessError as error:
        pattern = patterns[min(error.stdout.count("\n"), len(patterns) - 1)]
        raise InputError(
            f"{format_value(pattern)} cannot be matched: {error.stderr.strip()[-200:]}", where=where
        ) from error
    return [json.loads(line) for line in tried.stdout.splitlines()]


def match_values(patterns: Mapping[str, T], paths: Sequence[str], where: str) -> dict[str, T]:
    """Match each path to its value: HF PEFT's rank_pattern and alpha_pattern.

    A key is a regular expression for the end of a path, from a dot on ("q_proj", "0.attn.c_attn", "^model.layers.1.*").
    If several keys match, the first applies.

    Raises:
        InputError: a key matches none of `paths`.
    """
    values: dict[str, T] = {}
    matched = match_all(patterns, paths, where, suffix=True)
    for key, value in patterns.items():
        found = matched[key]
        if not found:
            raise InputError(f"{format_value(key)} matches none of the targets, such as {paths[0]!r}", where=where)
        values = {**dict.fromkeys(found, value), **values}
    return values
