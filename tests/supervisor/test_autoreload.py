"""What `dialogd --watch` takes for a change of the agent's code, and when."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor.autoreload import Look, Settling, Watch, look
from dialog_supervisor.snapshot import GenerationFailed

ONE: Look = {"agent.py": (1, 10, 100, 0o644)}
TWO: Look = {"agent.py": (1, 12, 200, 0o644)}


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """An agent's directory with a package in it."""
    (directory := tmp_path / "agent").mkdir()
    (directory / "agent.py").write_text("one")
    (directory / "menu").mkdir()
    (directory / "menu" / "soup.py").write_text("one")
    return directory


# What is seen


def test_files_are_seen_at_any_depth(agent: Path) -> None:
    assert look(agent, ()).keys() == {"agent.py", "menu/soup.py"}


def _rewrite(agent: Path) -> None:
    (agent / "agent.py").write_text("two")


def _replace(agent: Path) -> None:
    (agent / "new").write_text("one")
    os.utime(agent / "new", ns=(0, (agent / "agent.py").stat().st_mtime_ns))
    (agent / "new").rename(agent / "agent.py")


def _add(agent: Path) -> None:
    (agent / "menu" / "salad.py").touch()


def _remove(agent: Path) -> None:
    (agent / "menu" / "soup.py").unlink()


def _permit(agent: Path) -> None:
    (agent / "agent.py").chmod(0o755)


@pytest.mark.parametrize("change", [_rewrite, _replace, _add, _remove, _permit])
def test_a_change_is_seen(agent: Path, change: Callable[[Path], None]) -> None:
    os.utime(agent / "agent.py", ns=(0, 1))
    before = look(agent, ())
    change(agent)
    assert look(agent, ()) != before


@pytest.mark.parametrize(
    "name",
    [
        *("agent.py~", "#agent.py#", ".#agent.py", ".agent.py.swp", ".agent.py.swx", "4913", "agent.py___jb_tmp___"),
        *(".goutputstream-ABC", ".agent.py.kate-swp", "agent.py.tmp", ".DS_Store", "agent.pyc", ".git/index"),
        *("__pycache__/agent.cpython-311.pyc", ".venv/pyvenv.cfg", "dialog-generations-abc/copy.1/agent.py"),
    ],
)
def test_what_editors_and_tools_leave_is_not_seen(agent: Path, name: str) -> None:
    before = look(agent, ())
    (agent / name).parent.mkdir(exist_ok=True, parents=True)
    (agent / name).touch()
    assert look(agent, ()) == before


def test_what_is_left_out_of_snapshots_is_not_seen(agent: Path) -> None:
    (agent / "dialog.toml").touch()
    assert "dialog.toml" not in look(agent, [agent / "dialog.toml"])


def test_links_are_followed_and_lead_nowhere_twice(agent: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.py").touch()
    (agent / "shared.py").symlink_to(tmp_path / "shared.py")
    (agent / "loop").symlink_to(agent)
    (agent / "nowhere.py").symlink_to(tmp_path / "missing.py")
    assert look(agent, ()).keys() == {"agent.py", "menu/soup.py", "shared.py"}


def test_a_link_that_leads_back_to_itself_hides_no_other_file(agent: Path) -> None:
    (agent / "a.py").symlink_to(agent / "b.py")
    (agent / "b.py").symlink_to(agent / "a.py")
    assert look(agent, ()).keys() == {"agent.py", "menu/soup.py"}


def test_a_directory_that_is_gone_has_no_files(tmp_path: Path) -> None:
    assert look(tmp_path / "missing", ()) == {}


# When it counts


def test_what_has_not_changed_is_not_loaded() -> None:
    assert Settling(ONE).changed(ONE) == []


def test_a_change_counts_when_two_looks_agree() -> None:
    settling = Settling(ONE)
    assert [settling.changed(TWO), settling.changed(TWO), settling.changed(TWO)] == [[], ["agent.py"], []]


def test_files_saved_one_after_another_are_one_change() -> None:
    settling = Settling(ONE)
    more = TWO | {"menu.py": (2, 1, 1, 0o644)}
    assert [settling.changed(found) for found in (TWO, more, more)] == [[], [], ["agent.py", "menu.py"]]


def test_a_file_that_is_gone_is_a_change() -> None:
    settling = Settling(TWO | {"menu.py": (2, 1, 1, 0o644)})
    assert [settling.changed(TWO), settling.changed(TWO)] == [[], ["menu.py"]]


def test_a_directory_that_returns_as_it_was_has_not_changed() -> None:
    settling = Settling(ONE)
    assert [settling.changed(found) for found in ({}, {}, {}, ONE, ONE)] == [[]] * 5


def test_a_directory_that_returns_with_other_files_has() -> None:
    settling = Settling(ONE)
    assert [settling.changed(found) for found in ({}, {}, TWO, TWO)][-1] == ["agent.py"]


# The loop


async def test_each_change_is_loaded_once_also_when_loading_fails(agent: Path, autojump_clock: MockClock) -> None:
    send, loads = trio.open_memory_channel[str](10)

    async def reload() -> None:
        send.send_nowait((agent / "agent.py").read_text())
        raise GenerationFailed("it cannot be imported")

    watch = Watch(agent, ())
    await watch.begin()
    (agent / "agent.py").write_text("changed before the first look")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run, reload)
        assert await loads.receive() == "changed before the first look"
        (agent / "agent.py").write_text("changed again")
        assert await loads.receive() == "changed again"
        nursery.cancel_scope.cancel()
