"""`workers.sandbox`: what agent code cannot do in it, what it still can, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import AUTH_TOKEN, Dialogd
from tests.e2e.twilio_client import Twilio

CURIOUS = '''
"""An echo that tries what it should not, and tells of each attempt how it went."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from dialog_worker import Agent, Media, Message, VoIP

WANTED = [Path(path) for path in os.environ["WANTED"].split(":")]


def attempt(does, *arguments):
    try:
        return str(does(*arguments))
    except OSError as error:
        return errno.errorcode[error.errno]


def call(name, *arguments):
    if ctypes.CDLL(None, use_errno=True)[name](*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")


AT_IMPORT = {path.name: attempt(path.read_text) for path in WANTED}


class Curious(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        does = {"1": self.read, "2": self.write, "3": self.reach, "4": self.work}
        self.voip.trace("found", "", does[dtmf.digit]())

    def read(self):
        found = {path.name: attempt(path.read_text) for path in WANTED}
        return found | {f"{name} at import": value for name, value in AT_IMPORT.items()}

    def write(self):
        own = Path(tempfile.gettempdir())
        directories = {"own": own, "others'": own.parent, "code": Path(__file__).parent, "tmp": Path("/tmp")}
        found = {name: attempt((directory / "x").write_text, "x") for name, directory in directories.items()}
        return found | {
            "directory": str(own),
            "list": attempt(lambda: sorted(os.listdir(own))),
            "permitted": attempt((WANTED[-1] / "x").write_text, "x"),
            "null": attempt(Path("/dev/null").write_text, "x"),
        }

    def reach(self):
        template = os.getppid()
        dialogd = int(Path(f"/proc/{template}/stat").read_text().rpartition(")")[2].split()[1])
        return {
            "kill dialogd": attempt(os.kill, dialogd, 0),
            "kill the template": attempt(os.kill, template, 0),
            "kill everybody": attempt(os.kill, -1, 0),
            "kill itself": attempt(os.kill, os.getpid(), 0),
            "environment of dialogd": attempt(Path(f"/proc/{dialogd}/environ").read_bytes),
            "control socket": attempt(socket.socket, socket.AF_UNIX),
            "packets": attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
            "ptrace": attempt(call, "ptrace", 16, dialogd, 0, 0),
            "setuid": attempt(os.setuid, 65534),
            "unshare": attempt(call, "unshare", 0x10000000),
            "limits of dialogd": attempt(lambda: __import__("resource").prlimit(dialogd, 7)),
        }

    def work(self):
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.connect(server.getsockname())
        child = subprocess.run([sys.executable, "-c", "import json, ssl; print('run')"], capture_output=True, text=True)
        shell = subprocess.run("cat /etc/hosts >/dev/null && echo run", shell=True, capture_output=True, text=True)
        return {"child": child.stdout + child.stderr, "shell": shell.stdout + shell.stderr,
                "resolved": attempt(lambda: bool(socket.getaddrinfo("localhost", 80)))}


def create(voip: VoIP) -> Agent:
    return Curious(voip=voip)
'''


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what an agent may want: a credential, another's file, what it is given to read and to write."""
    here = tmp_path_factory.mktemp("places")
    for name in ("credentials", "given", "writable"):
        (here / name).mkdir()
    (here / "credentials" / "twilio_auth_token").write_text(AUTH_TOKEN)
    (here / "anothers").write_text("private")
    (here / "given" / "model").write_text("weights")
    (here / "given" / "recordings").mkdir()
    (here / "given" / "recordings" / "RE1.wav").write_text("speech")
    return here


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, places: Path) -> Dialogd:
    wanted = [places / "credentials" / "twilio_auth_token", places / "anothers", places / "given" / "model",
              places / "given" / "recordings" / "RE1.wav", places / "writable"]  # fmt: skip
    return start_shared_dialogd(
        agent=CURIOUS,
        workers={"sandbox": True, "readable": [str(places / "given")], "writable": [str(places / "writable")]},
        recordings={"directory": str(places / "given" / "recordings")},
        environ={
            "WANTED": ":".join(map(str, wanted)),
            "CREDENTIALS_DIRECTORY": str(places / "credentials"),
        },
    )


async def found(dialogd: Dialogd, key: str) -> dict[str, Any]:
    """Return what the agent found when it tried."""
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press(key)
        fields: dict[str, Any] = (await dialogd.step(call.sid, kind="found"))["fields"]
    await dialogd.ended(call.sid)
    return fields


async def test_agent_code_reads_what_it_is_given_and_neither_credentials_nor_recordings(dialogd: Dialogd) -> None:
    read = await found(dialogd, "1")
    for when in ("", " at import"):
        assert read[f"twilio_auth_token{when}"] == "EACCES"
        assert read[f"anothers{when}"] == "EACCES"
        assert read[f"RE1.wav{when}"] == "EACCES"
        assert read[f"model{when}"] == "weights"


async def test_agent_code_writes_to_its_own_directory_and_where_it_may(dialogd: Dialogd, places: Path) -> None:
    wrote = await found(dialogd, "2")
    assert (wrote["own"], wrote["list"], wrote["permitted"], wrote["null"]) == ("1", "['x']", "1", "1")
    assert (wrote["others'"], wrote["code"], wrote["tmp"]) == ("EACCES", "EACCES", "EACCES")
    assert (places / "writable" / "x").read_text() == "x"
    assert not await trio.Path(wrote["directory"]).exists()  # by now


async def test_agent_code_does_not_reach_dialogd_the_machine_or_another_user(dialogd: Dialogd) -> None:
    reached = await found(dialogd, "3")
    assert reached.pop("kill itself") == "None"
    assert reached.pop("control socket") == "EAFNOSUPPORT"
    assert reached.pop("packets") == "EAFNOSUPPORT"
    assert reached.pop("environment of dialogd") == "EACCES"
    assert set(reached.values()) == {"EPERM"}, reached


async def test_agent_code_works_as_before(dialogd: Dialogd) -> None:
    assert await found(dialogd, "4") == {"child": "run\n", "shell": "run\n", "resolved": "True"}
