"""A process before its forks: what it allocates next lies together, and the collector leaves alone what is there."""

import subprocess
import sys

_SCRIPT = """
import gc, random
from dialog_supervisor.frozen import freeze
scattered = [bytes(100) for _ in range(4_000)]
random.Random(1).shuffle(scattered)
del scattered[:2_000]
{freeze}
places = [id(one) for one in [bytes(100) for _ in range(50)]]
print(sum(after - before == 144 for before, after in zip(places, places[1:])), gc.get_freeze_count() > 1_000)
"""


def neighbours(freeze: str) -> list[str]:
    """Return how many of 49 new objects lie right behind the one before, and whether what was there is frozen."""
    script = _SCRIPT.format(freeze=freeze)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_what_is_allocated_after_it_lies_together_and_not_in_holes() -> None:
    assert int(neighbours("")[0]) < 25
    together, frozen = neighbours("freeze()")
    assert int(together) >= 48
    assert frozen == "True"
