"""What a bench leaves behind: the machine, the figures by their names, and the file that the next run is compared with."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from scripts.benches.stage import ROOT

KEPT = ROOT / "docs" / "bench"  # committed results
Figures = dict[str, float]  # by name, such as "echo_ms.p99"
_WORST = {"failed", "frames_lost"}  # of several runs; of everything else the median
_T = TypeVar("_T")


class Machine(Struct, frozen=True):
    """Where it was measured. Figures of two machines do not compare."""

    cpu: str
    cores: int
    memory_gb: int
    kernel: str
    python: str

    def __str__(self) -> str:
        return f"{self.cores} cores of {self.cpu}, {self.memory_gb} GB, Linux {self.kernel}, Python {self.python}"


class Run(Struct, frozen=True):
    """When and how it was measured."""

    at: str
    commit: str
    rounds: int
    seconds: float
    load_average: float  # of the minute before: above 0, something else ran

    def __str__(self) -> str:
        rounds = "one round" if self.rounds == 1 else f"the median of {self.rounds} rounds"
        return f"{self.at}, {self.commit}, {rounds} of {self.seconds:g} s, load average before it {self.load_average:g}"


class Results(Struct, frozen=True):
    """What one run of the echo bench measured: figures by the number of calls, and those that do not depend on it."""

    machine: Machine
    run: Run
    calls: dict[int, Figures]
    once: Figures


def machine() -> Machine:
    """Describe this machine."""
    models = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    kilobytes = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")), 0)
    return Machine(
        cpu=next(models, platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(kilobytes / 1024**2),
        kernel=platform.release(),
        python=platform.python_version(),
    )


def run_now(rounds: int, seconds: float) -> Run:
    """Describe the run that begins."""
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Run(
        at, _git("describe", "--always", "--dirty").strip() or "no commit", rounds, seconds, round(os.getloadavg()[0], 1)
    )


def figures(result: Struct) -> Figures:
    """Return the numbers of a result by their names, those of nested ones with a dot: `echo_ms.p99`."""
    return dict(_flat(msgspec.to_builtins(result), ""))


def _flat(found: Mapping[str, Any], prefix: str) -> Sequence[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat.append((prefix + name, value))
    return flat


def combined(rounds: Sequence[Figures]) -> Figures:
    """Return one set of figures for several rounds: medians, but of what must not happen the worst."""
    names = dict.fromkeys(name for found in rounds for name in found)
    chosen: dict[str, Callable[[Sequence[float]], float]] = {name: max if name in _WORST else median for name in names}
    return {name: round(chosen[name]([found[name] for found in rounds if name in found]), 3) for name in names}


def committed(name: str, of: type[_T]) -> _T | None:
    """Return the results that were committed last under this name, or None; what is not committed yet is no yardstick."""
    text = _git("show", f"HEAD:{(KEPT / name).relative_to(ROOT)}")
    try:
        return msgspec.json.decode(text, type=of) if text else None
    except msgspec.DecodeError:
        return None  # of a bench that measured other things


def write(path: Path, results: Struct) -> None:
    """Keep results in a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=ROOT).stdout
    except FileNotFoundError:
        return ""


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
