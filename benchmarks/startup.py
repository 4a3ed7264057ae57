"""`antdist --help` in a fresh process, against an empty Python program and one that imports torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks.report import Line, Options, Report, alternate, ratio

COMMANDS = {
    "antdist --help": ["-m", "antdist", "--help"],
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
}


def run(options: Options) -> Report:
    def make_work(arguments: list[str]) -> Callable[[], None]:
        def start() -> None:
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

        return start

    seconds = alternate({name: make_work(arguments) for name, arguments in COMMANDS.items()}, options.repeats)
    ours, nothing, torch = seconds.values()
    return Report(
        "startup",
        "a fresh process from its start to its end, files in the page cache: antdist --help against Python alone and "
        "against import torch",
        [
            *(Line(name, found, "s") for name, found in seconds.items()),
            ratio("antdist --help takes, of Python alone", ours, nothing),
            ratio("import torch takes, of antdist --help", torch, ours),
        ],
        [],
    )
