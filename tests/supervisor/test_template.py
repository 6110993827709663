"""The template's pure parts: what it tells an author of their mistake, and what it refuses to fork."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from dialog_supervisor.sections import WorkersConfig
from dialog_supervisor.template import Ping, Template, explain, load_entry

Write = Callable[[str, str], Path]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Return a function that writes a module into the agent's directory, where imports find it for one test."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)

    def write(name: str, code: str) -> Path:
        (tmp_path / f"{name}.py").write_text(code)
        return tmp_path

    yield write
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def explained(entry: str, directory: Path) -> str:
    """Return what the author of `entry` is told of its failure."""
    with pytest.raises((Exception, SystemExit)) as caught:
        load_entry(entry)()
    return explain(caught.value, directory)


# The entry


def test_an_entry_is_a_module_and_a_name_in_it(agent: Write) -> None:
    agent("entry_ok", "def create(voip):\n    return voip * 2\n")
    assert load_entry("entry_ok:create")(21) == 42


def test_an_entry_may_be_in_a_package(agent: Write, tmp_path: Path) -> None:
    (tmp_path / "entry_package").mkdir()
    (tmp_path / "entry_package" / "voice.py").write_text("create = len\n")
    assert load_entry("entry_package.voice:create") is len


def test_a_module_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    assert explained("entry_nowhere:create", tmp_path) == "ModuleNotFoundError: No module named 'entry_nowhere'"


def test_a_name_that_is_not_there_is_told_in_one_line(agent: Write) -> None:
    directory = agent("entry_empty", "")
    assert explained("entry_empty:create", directory) == "AttributeError: module 'entry_empty' has no attribute 'create'"


# Its end


def test_it_ends_without_a_word_when_the_supervisor_is_gone_before_it_is_answered() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        with ours:
            ours.send(msgspec.msgpack.encode(Ping()))
        Template(theirs, id, lambda *_: 0, "1", permitted=WorkersConfig(), sandbox=None, stack_fd=-1).serve()


# Tracebacks


def test_a_traceback_begins_in_the_agents_own_code(agent: Write) -> None:
    directory = agent("entry_raises", "def fail():\n    return 1 / 0\n\nfail()\n")
    text = explained("entry_raises:create", directory)
    first, second, *_ = text.splitlines()
    assert first == "Traceback (most recent call last):"
    assert second == f'  File "{directory}/entry_raises.py", line 4, in <module>'
    assert "in fail" in text
    assert "importlib" not in text
    assert text.endswith("ZeroDivisionError: division by zero")


def test_a_traceback_goes_on_through_the_libraries_that_the_agent_called(agent: Write) -> None:
    directory = agent("entry_json", "import json\njson.loads('{')\n")
    text = explained("entry_json:create", directory)
    assert text.index("entry_json.py") < text.index("json/decoder.py")


def test_a_syntax_error_shows_its_place_and_nothing_of_ours(agent: Write) -> None:
    directory = agent("entry_typo", "x = 1\ndef create(:\n")
    text = explained("entry_typo:create", directory)
    assert f'File "{directory}/entry_typo.py", line 2' in text
    assert "def create(:" in text
    assert "importlib" not in text
    assert "template.py" not in text


def test_a_syntax_error_in_a_second_file_shows_who_imports_it(agent: Write) -> None:
    agent("entry_typo2", "def create(:\n")
    directory = agent("entry_imports", "import entry_typo2\n")
    text = explained("entry_imports:create", directory)
    assert "entry_imports.py" in text
    assert f'File "{directory}/entry_typo2.py", line 1' in text


def test_a_cause_is_told_too(agent: Write) -> None:
    code = "try:\n    {}['key']\nexcept KeyError as error:\n    raise ValueError('no settings') from error\n"
    text = explained("entry_cause:create", agent("entry_cause", code))
    assert "KeyError: 'key'" in text
    assert text.endswith("ValueError: no settings")


def test_an_exit_is_explained_like_any_failure(agent: Write) -> None:
    text = explained("entry_exit:create", agent("entry_exit", "raise SystemExit('set OPENAI_API_KEY')\n"))
    assert text.endswith("SystemExit: set OPENAI_API_KEY")


def test_an_endless_message_is_cut_at_its_beginning(agent: Write) -> None:
    text = explained("entry_long:create", agent("entry_long", "raise ValueError('x' * 100_000 + ' the end')\n"))
    assert len(text) <= 16_000
    assert text.endswith("x the end")


# Forkable or not: each in a process of its own, because the tests' own process has threads of its loops


def refused(imported: str) -> str:
    """Return why a process that has run `imported` cannot be forked, or "" when it can."""
    code = f"""
import faulthandler, os, socket, threading
from dialog_supervisor.template import Unforkable, check_forkable
one, other = socket.socketpair()
{imported}
try:
    check_forkable({{one.fileno(), other.fileno()}})
except Unforkable as error:
    print(error, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_process_with_one_thread_and_known_sockets_can_be_forked() -> None:
    assert refused("") == ""


def test_a_thread_is_refused_by_name() -> None:
    said = refused("threading.Thread(target=threading.Event().wait, name='metrics-exporter').start()")
    assert said == "importing the agent started threads (metrics-exporter); start them in the agent's run()"


def test_a_thread_that_python_does_not_know_is_refused_with_a_remedy() -> None:
    said = refused("faulthandler.dump_traceback_later(3600)")  # whose watchdog is such a thread
    assert said.startswith("importing the agent started 1 native threads")
    assert '[agent.env] OMP_NUM_THREADS = "1"' in said


def test_an_open_socket_is_refused() -> None:
    said = refused("opened = socket.socket()")
    assert said == "importing the agent opened a network connection; open it in the agent's run()"


def test_open_files_and_pipes_are_no_obstacle() -> None:
    assert refused("pipe, file = os.pipe(), open('/dev/null', 'wb')") == ""
