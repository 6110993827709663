"""`python -m tests.chaos`: plays the faults one after another, and prints a table of what the callers noticed."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import cyclopts
import msgspec
import trio
from cyclopts import Parameter

from tests.chaos.batch import CALLS, Row, play
from tests.chaos.caller import Voices
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.rehearsal import MAX_CONTEXTS, synthesised
from tests.conftest import local_providers

HEAD = ("fault", "others disturbed", "went on", "longest silence", "leftovers", "")
PLAYED_AT_MOST = (
    2  # times: a machine that is busy with something else disturbs calls too, and the table says how often it was
)

app = cyclopts.App(name="scripts/chaos", help=__doc__)


@app.default
def run(
    *,
    repeat: int = CALLS,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    json_: Annotated[Path | None, Parameter(name="--json")] = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Break the real thing in a running dialogd with ten calls that talk. Exit code 1 when anything is not as promised.

    Parameters
    ----------
    repeat
        How often each fault strikes, at most ten times.
    only
        The names of the faults to play; all by default.
    list_
        Print the names of the faults, and play none.
    json_
        Write the rows, with every complaint, to this file as JSON.
    keep
        Keep each dialogd's directory and log, and say where they are.
    """
    names = [fault.name for fault in FAULTS]
    if list_:
        print(*names, sep="\n")
        return 0
    if unknown := set(only or ()) - set(names):
        print(f"chaos: there is no fault {', '.join(sorted(unknown))}; scripts/chaos --list names them", file=sys.stderr)
        return 2
    if not 1 <= repeat <= CALLS:
        print(f"chaos: --repeat {repeat}: from 1 to {CALLS}", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="dialog-chaos."))
    rows = trio.run(_play_all, [fault for fault in FAULTS if not only or fault.name in only], directory, repeat)
    _print(rows)
    if json_ is not None:
        json_.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    if keep:
        print(f"the logs are in {directory}")
    else:
        shutil.rmtree(directory)
    return 0 if all(row.right for row in rows) else 1


async def _play_all(faults: Sequence[Fault], directory: Path, repeat: int) -> list[Row]:
    rows: list[Row] = []
    with local_providers("--max-contexts", str(MAX_CONTEXTS)) as server:
        voices = await synthesised(server)
        for number, fault in enumerate(faults, 1):
            for played in range(1, PLAYED_AT_MOST + 1):
                row = await _played(fault, directory / f"{number:02}-{played}", server, voices, repeat)
                row = msgspec.structs.replace(row, played=played)
                if row.right or not row.struck:
                    break
            rows.append(row)
            print(f"{number}/{len(faults)} {' | '.join(row.cells())}", *row.complaints, sep="\n    ", file=sys.stderr)
    return rows


async def _played(fault: Fault, directory: Path, server: str, voices: Voices, repeat: int) -> Row:
    """Return a fault's row, which says so where it could not be played."""
    if lacking := fault.props.lacking:
        return Row.not_played(fault, f"this machine lacks {lacking}")
    try:
        return await play(fault, directory, server, voices, struck=repeat)
    except Exception as error:  # noqa: BLE001 - a row's boundary: what goes wrong in one must not cost the others
        return Row.not_played(fault, f"it broke the scene: {error!r}")


def _print(rows: Sequence[Row]) -> None:
    table = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(HEAD))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if shares := [share for row in rows for share in row.shares_ms]:
        print(
            "from SIGKILL to the first frame of new speech, less the model's and the voice's time: "
            f"p50 {median(shares):.0f} ms, max {max(shares):.0f} ms, of {len(shares)}"
        )


if __name__ == "__main__":
    sys.exit(app())
