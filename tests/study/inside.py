"""Run a study whose cells run in its own process and estimate nothing: python -m tests.study.inside ARGUMENTS"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipeft.cli import main
from minipeft.files import write_json
from minipeft.runs import planning
from minipeft.study import cells, report, runner
from minipeft.study.cells import Cell


def patch(put: Callable[[object, str, object], None]) -> list[str]:
    """Let `put(module, name, value)` replace how a cell is started; the list gets the names of the cells that ran."""
    ran: list[str] = []

    def here(cell: Cell, out: Path, settings: object, bar: Any, stop: list[int]) -> str | None:
        ran.append(cell.name)
        write_json(out / "cells" / cell.name / "cell.json", cell.as_json())
        before = os.getcwd()
        try:
            status = cells.main([str(out), f"cells/{cell.name}", "{}"])
        finally:
            os.chdir(before)
        return None if status == 0 else f"exit status {status}"

    put(runner, "run_cell", here)
    put(report, "draw_packed_rows", lambda *_: ("", ""))  # test_packed_rows.py tests it
    put(planning, "PROBE_SECONDS", 0.001)
    put(planning, "count_step_bytes", lambda model, ids: 0)  # of the estimate that a run prints; tests/runs tests it
    return ran


if __name__ == "__main__":
    patch(setattr)
    sys.exit(main(sys.argv[1:]))
