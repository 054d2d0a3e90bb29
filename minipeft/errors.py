"""The one exception that minipeft raises for what a caller's input did: `FILE: WHERE: PROBLEM. HINT`."""

from pathlib import Path


class InputError(ValueError):
    """What the caller gave cannot be used; the text says which file or argument, where in it, why, and what to do.

    The parts that are known are joined as `FILE: WHERE: PROBLEM. HINT`. The command line prints this text after
    `error: ` and ends with status 2; nothing half-written is left behind.
    """

    def __init__(
        self, problem: str, *, file: str | Path | None = None, where: str | None = None, hint: str | None = None
    ):
        place = [str(part) for part in (file, where) if part is not None]
        text = ": ".join([*place, problem])
        whole = text if hint is None else f"{text}. {hint}"
        # a name out of a file may hold a line end, an escape sequence or half a character: shown, never printed
        super().__init__("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in whole))
