"""The template: a process that has imported the agent's code once, and forks a worker for each call.

It runs no event loop and one thread, because a fork copies only the thread that forks. It is spoken to over a SOCK_SEQPACKET
socket: a `Fork` comes with the worker's descriptors as SCM_RIGHTS, the `Forked` that answers it with the child's pidfd.
The interpreter may be another than the supervisor's; nothing here needs more than the standard library, msgspec and
`dialog_worker`, which is found by name, as the agent is.
"""

import faulthandler
import importlib
import io
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import msgspec

from dialog_supervisor import frozen
from dialog_supervisor.confinement import limits
from dialog_supervisor.confinement.sandbox import Confinement, Sandbox
from dialog_supervisor.sections import WorkersConfig
from protocol.messages import PROTOCOL_VERSION

_WORKER = "dialog_worker.main"  # by name: the supervisor's rooms do not import the worker's
_REHEARSAL = "dialog_worker.rehearsal"
MAX_PACKET_BYTES = 64 << 10
_TRACEBACK_CHARACTERS = 16_000
_STDOUT_FD, _STDERR_FD = 1, 2
FORK_FDS = 5  # of a `Fork`: link, standard output and error, the file for a stack, and, where there is one, a control group
STACK_SIGNAL = signal.SIGRTMIN  # a worker prints its main thread's stack at it; no library that we know uses this one
STACKS_SIGNAL = signal.SIGRTMIN + 1  # all threads' stacks

Create: TypeAlias = Callable[[Any], Any]
Run: TypeAlias = Callable[[socket.socket, Create, str, str], int]  # link, entry, generation, call id -> exit code


class Fork(msgspec.Struct, tag=True):
    """Fork a worker for this call; its `FORK_FDS` descriptors come along."""

    call_id: str


class Ping(msgspec.Struct, tag=True):
    """Say that you are there."""


class Ready(msgspec.Struct, tag=True):
    """The agent's code is imported."""

    version: int


class Failed(msgspec.Struct, tag=True):
    """The agent's code cannot serve calls; the template exits."""

    reason: str


class Forked(msgspec.Struct, tag=True):
    """A worker runs; its pidfd comes along."""

    call_id: str
    pid: int


class ForkFailed(msgspec.Struct, tag=True):
    """No worker could be forked for this call."""

    call_id: str
    reason: str


class Exited(msgspec.Struct, tag=True):
    """A worker is gone: its exit code, or the negative number of the signal that ended it."""

    pid: int
    code: int


class Pong(msgspec.Struct, tag=True):
    """The template is there."""


Report: TypeAlias = Ready | Failed | Forked | ForkFailed | Exited | Pong
_encode = msgspec.msgpack.Encoder().encode


class Unforkable(Exception):
    """The agent's import left something behind that a fork would break."""


def load_entry(entry: str) -> Any:
    """Return what `module:name` names. Raises whatever importing the module raises, or AttributeError."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def explain(error: BaseException, directory: Path) -> str:
    """Return a traceback for the agent's author: it begins at the first frame in the agent's own directory."""
    found = traceback.TracebackException.from_exception(error, capture_locals=False)
    inside = [index for index, frame in enumerate(found.stack) if Path(frame.filename).is_relative_to(directory)]
    del found.stack[: inside[0] if inside else len(found.stack)]  # a SyntaxError names its own file and line
    return "".join(found.format())[-_TRACEBACK_CHARACTERS:].rstrip()


def check_forkable(known: set[int]) -> None:
    """Refuse threads and open sockets: a forked child has the threads' locks without the threads, and shares the sockets."""
    if threads := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        raise Unforkable(f"importing the agent started threads ({', '.join(threads)}); start them in the agent's run()")
    if (count := len(os.listdir("/proc/self/task"))) > 1:
        raise Unforkable(
            f"importing the agent started {count - 1} native threads; libraries that compute usually have a setting, "
            'such as [agent.env] OMP_NUM_THREADS = "1"'
        )
    for name in os.listdir("/proc/self/fd"):
        if int(name) > _STDERR_FD and int(name) not in known:
            with suppress(FileNotFoundError):  # the listing's own descriptor is gone by now
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:"):
                    raise Unforkable("importing the agent opened a network connection; open it in the agent's run()")


class Template:
    """Forks on request and reports what became of the children, until the supervisor closes its end."""

    def __init__(
        self,
        control: socket.socket,
        create: Create,
        run: Run,
        generation: str,
        *,
        permitted: WorkersConfig,
        sandbox: Sandbox | None,
        stack_fd: int,
    ) -> None:
        self._control = control
        self._create = create
        self._run = run
        self._generation = generation
        self._permitted = permitted
        self._sandbox = sandbox
        self._stack_fd = stack_fd
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, int] = {}  # pidfd -> pid

    def serve(self) -> None:
        """Serve until the supervisor is gone. Workers under way go on; the closed link tells them the same."""
        with suppress(ConnectionError):  # it is gone before it could be told
            while True:
                for key, _ in self._selector.select():
                    if key.fd != self._control.fileno():
                        self._reap(key.fd)
                    elif not self._request():
                        return

    def _request(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, FORK_FDS)
        if not data:
            return False
        request = msgspec.msgpack.decode(data, type=Fork | Ping)
        if isinstance(request, Ping):
            self._control.send(_encode(Pong()))
            return True
        with socket.socket(fileno=fds[0]) as link, ExitStack() as files:
            for fd in fds[1:]:
                files.callback(os.close, fd)
            try:
                _flush()  # or every worker would print it again
                check_forkable({self._control.fileno(), link.fileno()})
                pid = os.fork()
            except (OSError, Unforkable) as error:
                self._control.send(_encode(ForkFailed(request.call_id, limits.why_not_forked(error))))
                return True
            if pid == 0:
                self._become_worker(link, request.call_id, fds[1:])
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._selector.register(pidfd, selectors.EVENT_READ)
        socket.send_fds(self._control, [_encode(Forked(request.call_id, pid))], [pidfd])
        return True

    def _become_worker(self, link: socket.socket, call_id: str, files: list[int]) -> NoReturn:
        """Be the child: keep the link and nothing else of the template's, serve the call, exit."""
        code = 1
        try:
            os.setsid()
            out, err, stack, *group = files
            self._print_to(out, err, stack)
            for fd in group:
                _enter(fd)
            self._selector.close()
            self._control.close()
            for pidfd in self._children:
                os.close(pidfd)
            limits.apply(self._permitted)
            if self._sandbox is not None:
                self._sandbox.enter_worker()
            code = self._run(link, self._create, self._generation, call_id)
        except BaseException:  # noqa: BLE001 - nothing of the template's may run on in the child
            traceback.print_exc()
        finally:
            try:
                _flush()
            finally:
                os._exit(code)

    def _print_to(self, out: int, err: int, stack: int) -> None:
        """Have what is printed, also by libraries and by other processes, and the stack when it is asked for, go there."""
        for theirs, place, kept in ((out, _STDOUT_FD, True), (err, _STDERR_FD, True), (stack, self._stack_fd, False)):
            os.dup2(theirs, place, inheritable=kept)
            os.close(theirs)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._control.send(_encode(Exited(pid, os.waitstatus_to_exitcode(status))))


def _enter(group: int) -> None:
    """Enter the worker's control group, before anything is started that it should bound."""
    try:
        limits.enter_group(group)
    except OSError as error:
        print(f"the worker's control group cannot be entered: {error.strerror}", file=sys.stderr)
    os.close(group)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # Python's own way to say that it was closed
            with suppress(OSError):
                stream.flush()


def _show_stacks_on_request() -> int:
    """Print stacks at `STACK_SIGNAL` and `STACKS_SIGNAL`; return the descriptor that it goes to, where workers put a file.

    faulthandler prints in the signal's handler, in C: also while the thread computes, waits or holds the interpreter's
    lock, in a regular expression say. Only a process that the kernel does not run, stopped or waiting for a disk, does not.
    """
    fd = os.open(os.devnull, os.O_WRONLY)
    faulthandler.register(STACK_SIGNAL, file=fd, all_threads=False)
    faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True)
    return fd


def prepare(directory: Path, entry: str, permitted: WorkersConfig) -> tuple[Create, Run]:
    """Import everything that a call needs, so that a fork has it already. Raises what the agent's code raises."""
    worker = importlib.import_module(_WORKER)
    worker.prepare()
    os.chdir(directory)  # so that a relative path is beside the code, and of the same version
    sys.path.insert(0, str(directory))
    create = load_entry(entry)
    if not callable(create):
        raise TypeError(f"{entry} is {type(create).__name__}, not a function that takes a VoIP and returns an Agent")
    if not importlib.import_module(_REHEARSAL).rehearse():
        print("a rehearsal of a call failed: calls will take more memory, and longer to begin", file=sys.stderr)
    frozen.freeze()
    if reason := limits.too_large_for(permitted):
        raise Unforkable(reason)
    return create, worker.run


def _confine(confinement: Confinement | None, directory: Path) -> Sandbox | None:
    if confinement is None:
        return None
    try:
        sandbox = Sandbox(confinement, directory)
        sandbox.enter()
    except OSError as error:
        raise Unforkable(f"workers.sandbox: the kernel refuses it: {error}") from error
    return sandbox


def main() -> int:
    """Serve as the template: `… -m dialog_supervisor.template CONTROL_FD DIRECTORY ENTRY GENERATION LIMITS CONFINEMENT`.

    The last two are JSON.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # dialogd blocks those that it reads
    control_fd, directory, entry, generation, limiting, confining = sys.argv[1:]
    permitted = msgspec.json.decode(limiting, type=WorkersConfig, dec_hook=lambda kind, value: kind(value))  # paths
    confinement = msgspec.json.decode(confining, type=Confinement | None)
    faulthandler.enable()
    stack_fd = _show_stacks_on_request()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe's would be told of a line when there are 8 KB of them
    with socket.socket(fileno=int(control_fd)) as control:
        try:
            sandbox = _confine(confinement, Path(directory))
            create, run = prepare(Path(directory), entry, permitted)
            check_forkable({control.fileno()})
        except Unforkable as error:
            control.send(_encode(Failed(str(error))))
        except BaseException as error:  # noqa: BLE001 - whatever the author's code does, sys.exit included, is reported to them
            control.send(_encode(Failed(explain(error, Path(directory)))))
        else:
            control.send(_encode(Ready(PROTOCOL_VERSION)))
            Template(control, create, run, generation, permitted=permitted, sandbox=sandbox, stack_fd=stack_fd).serve()
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
