"""A file that comes over the network: whole and private under its name, or not there at all."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio

from dialog_supervisor.files import NotKept, keep


class Broken(Exception):
    """The network fails."""


@asynccontextmanager
async def content(
    *chunks: bytes, then: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Bring chunks, and do something before the last of them."""

    async def bring() -> AsyncGenerator[bytes, None]:
        for chunk in chunks[:-1]:
            yield chunk
        if then is not None:
            await then()
        yield chunks[-1]

    async with aclosing(bring()) as bringing:
        yield bringing


def listing(directory: Path) -> list[str]:
    """Return the names of what is there."""
    return sorted(path.name for path in directory.iterdir())


async def test_what_came_is_there_under_its_name(tmp_path: Path) -> None:
    path = await keep(content(b"RI", b"", b"FF"), tmp_path / "call.wav", 4)
    assert (path, path.read_bytes()) == (tmp_path / "call.wav", b"RIFF")


async def test_nobody_else_may_read_it_or_its_directory(tmp_path: Path) -> None:
    path = await keep(content(b"RIFF"), tmp_path / "new" / "recordings" / "call.wav", 4)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


async def test_there_is_nothing_under_its_name_before_it_is_whole(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    async def look() -> None:
        seen.append(listing(tmp_path))

    await keep(content(b"RI", b"FF", then=look), tmp_path / "call.wav", 4)
    assert (seen, listing(tmp_path)) == ([["call.wav.part"]], ["call.wav"])


async def test_one_byte_too_many_is_refused_with_the_limits_name_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotKept, match=r"larger than 3 bytes \(recordings\.size_limit\)"):
        await keep(content(b"RI", b"FF"), tmp_path / "call.wav", 3)
    assert listing(tmp_path) == []


async def test_what_breaks_off_goes_through_and_leaves_nothing(tmp_path: Path) -> None:
    async def break_off() -> None:
        raise Broken

    with pytest.raises(Broken):
        await keep(content(b"RI", b"FF", then=break_off), tmp_path / "call.wav", 4)
    assert listing(tmp_path) == []


async def test_a_cancelled_copy_leaves_nothing(tmp_path: Path) -> None:
    async def stall() -> None:
        copying.cancel()
        await trio.sleep_forever()

    with trio.CancelScope() as copying:
        await keep(content(b"RI", b"FF", then=stall), tmp_path / "call.wav", 4)
    assert copying.cancelled_caught
    assert listing(tmp_path) == []


async def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "call.wav.part").symlink_to("/dev/full")
    with pytest.raises(NotKept, match=r"call\.wav cannot be written: No space left on device"):
        await keep(content(b"RIFF"), tmp_path / "call.wav", 4)
    assert listing(tmp_path) == []


async def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "recordings").write_text("a file")
    with pytest.raises(NotKept, match=r"recordings/call\.wav cannot be written: File exists"):
        await keep(content(b"RIFF"), tmp_path / "recordings" / "call.wav", 4)


async def test_a_name_that_is_taken_by_a_directory_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "call.wav").mkdir()
    with pytest.raises(NotKept, match="Is a directory"):
        await keep(content(b"RIFF"), tmp_path / "call.wav", 4)
    assert listing(tmp_path) == ["call.wav"]


async def test_the_rest_of_a_copy_that_was_killed_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "call.wav.part").write_bytes(b"half a recording of long ago")
    path = await keep(content(b"RIFF"), tmp_path / "call.wav", 4)
    assert path.read_bytes() == b"RIFF"
