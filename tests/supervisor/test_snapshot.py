"""Snapshots of an agent's directory: what is in them, what they are called, and what becomes of them."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from dialog_supervisor import snapshot
from dialog_supervisor.snapshot import GenerationFailed, Snapshot, private_directory, take


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    directory = tmp_path / "agent"
    (directory / "kitchen").mkdir(parents=True)
    (directory / "agent.py").write_text("import kitchen.menu\n")
    (directory / "kitchen" / "menu.py").write_text("dish = 'lasagne'\n")
    return directory


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    directory = tmp_path / "shelf"
    directory.mkdir()
    return directory


def files(taken: Snapshot) -> set[str]:
    return {str(path.relative_to(taken.directory)) for path in taken.directory.rglob("*") if path.is_file()}


def hash_of(agent: Path, shelf: Path, number: int) -> str:
    return take(agent, shelf, number).hash


# What is in it


def test_a_snapshot_has_what_the_directory_has(agent: Path, shelf: Path) -> None:
    taken = take(agent, shelf, 1)
    assert files(taken) == {"agent.py", "kitchen/menu.py"}
    assert (taken.directory / "kitchen" / "menu.py").read_text() == "dish = 'lasagne'\n"


def test_a_snapshot_does_not_change_with_the_directory(agent: Path, shelf: Path) -> None:
    taken = take(agent, shelf, 1)
    (agent / "agent.py").write_text("import something_else\n")
    assert (taken.directory / "agent.py").read_text() == "import kitchen.menu\n"


@pytest.mark.parametrize("name", ["__pycache__", ".git", ".venv", "node_modules"])
def test_what_is_made_from_other_files_is_left_out(agent: Path, shelf: Path, name: str) -> None:
    (agent / "kitchen" / name).mkdir()
    (agent / "kitchen" / name / "large.py").write_text("pass\n")
    assert files(take(agent, shelf, 1)) == {"agent.py", "kitchen/menu.py"}


def test_compiled_modules_sockets_and_pipes_are_left_out(agent: Path, shelf: Path) -> None:
    (agent / "menu.pyc").write_bytes(b"")
    os.mkfifo(agent / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(agent / "control.sock"))  # a unix socket's path is short
        assert files(take(agent, shelf, 1)) == {"agent.py", "kitchen/menu.py"}


def test_paths_that_are_nobodys_business_are_left_out(agent: Path, shelf: Path) -> None:
    (agent / ".env").write_text("TWILIO_AUTH_TOKEN=secret\n")
    (agent / "kitchen" / ".env").write_text("OVEN=hot\n")
    assert files(take(agent, shelf, 1, [agent / ".env"])) == {"agent.py", "kitchen/menu.py", "kitchen/.env"}


def test_files_and_directories_are_read_only(agent: Path, shelf: Path) -> None:
    (agent / "run.sh").touch(mode=0o755)
    taken = take(agent, shelf, 1).directory
    modes = {path.name: path.stat().st_mode & 0o777 for path in (taken, *taken.rglob("*"))}
    assert modes == {taken.name: 0o555, "agent.py": 0o444, "run.sh": 0o555, "kitchen": 0o555, "menu.py": 0o444}


# Links


def test_a_link_to_a_file_becomes_the_file(agent: Path, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text("tax = 7\n")
    (agent / "shared.py").symlink_to(tmp_path / "shared.py")
    taken = take(agent, shelf, 1).directory / "shared.py"
    assert (taken.read_text(), taken.is_symlink()) == ("tax = 7\n", False)


def test_a_link_to_a_directory_becomes_the_directory(agent: Path, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "tax.py").write_text("tax = 7\n")
    (agent / "shared").symlink_to(tmp_path / "shared")
    assert "shared/tax.py" in files(take(agent, shelf, 1))


def test_an_editors_lock_that_links_nowhere_is_left_out(agent: Path, shelf: Path) -> None:
    (agent / ".#agent.py").symlink_to("cook@kitchen.1234")
    assert files(take(agent, shelf, 1)) == {"agent.py", "kitchen/menu.py"}


def test_a_link_that_leads_back_is_refused(agent: Path, shelf: Path) -> None:
    (agent / "kitchen" / "again").symlink_to(agent)
    with pytest.raises(GenerationFailed, match=r"kitchen/again leads back to a directory that it is in; remove the link"):
        take(agent, shelf, 1)
    assert list(shelf.iterdir()) == []


# Its name


def test_its_name_is_the_contents_hash_and_the_number_of_the_load(agent: Path, shelf: Path) -> None:
    first, second = take(agent, shelf, 1), take(agent, shelf, 2)
    assert first.hash == second.hash
    assert (first.name, second.name) == (f"{first.hash}.1", f"{first.hash}.2")


def test_the_hash_differs_with_a_files_content(agent: Path, shelf: Path) -> None:
    before = hash_of(agent, shelf, 1)
    (agent / "kitchen" / "menu.py").write_text("dish = 'risotto'\n")
    assert hash_of(agent, shelf, 2) != before


def test_the_hash_differs_with_a_files_name(agent: Path, shelf: Path) -> None:
    before = hash_of(agent, shelf, 1)
    (agent / "agent.py").rename(agent / "kitchen" / "agent.py")
    assert hash_of(agent, shelf, 2) != before


def test_the_hash_does_not_differ_with_the_directorys_place(agent: Path, shelf: Path) -> None:
    before = hash_of(agent, shelf, 1)
    assert hash_of(agent.rename(agent.with_name("moved")), shelf, 2) == before


def test_a_traceback_is_told_with_the_authors_paths(agent: Path, shelf: Path) -> None:
    taken = take(agent, shelf, 1)
    assert taken.as_written(f'File "{taken.directory}/agent.py", line 1') == f'File "{agent}/agent.py", line 1'


# What cannot be copied


def test_a_directory_that_is_gone_is_named(tmp_path: Path, shelf: Path) -> None:
    with pytest.raises(
        GenerationFailed, match=rf"^agent.path: {tmp_path}/none cannot be copied: No such file or directory; "
    ):
        take(tmp_path / "none", shelf, 1)


def test_a_directory_that_is_too_large_is_refused_and_leaves_nothing(
    agent: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SIZE_LIMIT_BYTES", 30)
    with pytest.raises(GenerationFailed, match=rf"^agent.path: {agent} has over 30 bytes .* up to {agent}/kitchen/menu.py;"):
        take(agent, shelf, 1)
    assert list(shelf.iterdir()) == []


def test_too_many_files_are_refused(agent: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "FILES_LIMIT", 1)
    with pytest.raises(GenerationFailed, match="or 1 files"):
        take(agent, shelf, 1)


# The directory that they are in


def test_a_removed_snapshot_leaves_nothing(agent: Path, shelf: Path) -> None:
    take(agent, shelf, 1).remove()
    assert list(shelf.iterdir()) == []


def test_the_directory_is_for_this_user_alone_and_goes_with_everything_in_it(agent: Path, shelf: Path) -> None:
    with private_directory(shelf / "generations") as directory:
        assert directory.path.stat().st_mode & 0o777 == 0o700
        take(agent, directory.path, 1)
    assert list((shelf / "generations").iterdir()) == []


def test_what_a_killed_dialogd_left_is_removed_by_the_next(shelf: Path) -> None:
    (shelf / "dialog-generations-old").mkdir()
    with private_directory(shelf) as directory:
        assert list(shelf.iterdir()) == [directory.path]


def test_the_directory_of_a_dialogd_that_lives_stays(shelf: Path) -> None:
    with private_directory(shelf) as other, private_directory(shelf) as directory:
        assert set(shelf.iterdir()) == {other.path, directory.path}


@pytest.mark.parametrize("moment", ["before it is locked", "while it is looked at"])
def test_a_directory_that_another_dialogd_takes_for_a_forsaken_one_is_made_again(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    made: list[Path] = []

    def make(prefix: str, dir: Path) -> str:
        made.append(dir / f"{prefix}{len(made)}")
        made[-1].mkdir()
        if len(made) == 1 and moment == "before it is locked":
            made[0].rmdir()
        elif len(made) == 1:
            held.append(os.open(made[0], os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return str(made[-1])

    held: list[int] = []
    monkeypatch.setattr("tempfile.mkdtemp", make)
    with private_directory(shelf) as directory:
        assert directory.path == made[1]
    for descriptor in held:
        os.close(descriptor)


def test_a_directory_that_cannot_be_made_is_told_with_a_remedy(shelf: Path) -> None:
    (shelf / "file").touch()
    with pytest.raises(
        GenerationFailed, match=r"cannot be copied to .*/file/generations: Not a directory; have TMPDIR name"
    ):
        private_directory(shelf / "file" / "generations").__enter__()
