"""`workers.sandbox`: processes that run agent code see no file that they need not, and have no system call that reaches out.

The template confines itself before it imports the agent: which files it may read, and which calls it has. A worker confines
itself further: to its own directory for temporary files, which is the only one that it may write to.
"""

import ctypes
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from dialog_supervisor.confinement import landlock, seccomp
from dialog_supervisor.confinement.landlock import EVERYTHING, READ, WRITE, Right, Rule

_PR_SET_NO_NEW_PRIVS = 38  # prctl(2)
_CAPABILITIES_VERSION_3, _CAPABILITY_SETS_BYTES = 0x20080522, 24  # capget(2)
_libc = ctypes.CDLL(None, use_errno=True)

_SYSTEM = (  # what programs and libraries read everywhere; what a machine has not is passed over
    "/usr", "/bin", "/sbin", "/lib", "/lib64",
    "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/timezone", "/etc/mime.types",
    "/etc/passwd", "/etc/group",  # names of users; no passwords
    "/etc/ssl", "/etc/pki", "/etc/ca-certificates",
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf",
    "/etc/services", "/etc/protocols",
    "/proc",  # of other processes it shows what ps does: Landlock keeps their memory and environment from those inside
    "/sys/devices/system/cpu",
    "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip
_NAMED_BY_THE_ENVIRONMENT = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_DISCARDING = "/dev/null"


class Confinement(msgspec.Struct, frozen=True):
    """What a template is told of its sandbox: paths, absolute.

    `hidden` is not shown where it is inside of what is; but what is inside of it, when it is named, is. `scratch` has the
    workers' own directories.
    """

    scratch: str
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


def lacking() -> str:
    """Return what this machine has not for a sandbox, or "" when it has all."""
    if seccomp.this_machine() is None:
        return f"there is no table of system calls for {os.uname().machine}"
    if not seccomp.supported():
        return "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"
    if not landlock.version():
        return "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK), or lsm= leaves it out at boot"
    return ""


def visible(path: Path, hidden: Sequence[Path]) -> Iterator[tuple[Path, Right]]:
    """Yield what to permit so that a path can be read, but for what is hidden below it. All are absolute, and no links.

    Where something is hidden in it, a directory is taken apart: its names may be read, and of what is in it, the rest.
    """
    if path in hidden:
        return
    inside = [one for one in hidden if one.is_relative_to(path)]
    if not inside:
        yield path, READ
        return
    yield path, Right.READ_DIR
    for child in sorted(path.iterdir()):
        if not child.is_symlink():  # what a link leads to is permitted by its own place, or not
            yield from visible(child, inside)


class Sandbox:
    """A template's side of it. Raises OSError when the kernel refuses."""

    def __init__(self, confinement: Confinement, directory: Path) -> None:
        """`directory`: the agent's code."""
        self._scratch = Path(confinement.scratch)
        hidden = [Path(path).resolve() for path in confinement.hidden]
        shown: list[str | Path] = [
            *_SYSTEM,
            *_interpreter(),
            *_environment(),
            directory,
            *confinement.readable,
            *confinement.writable,
        ]
        permitted = [one for path in _distinct(shown) for one in visible(path, hidden)]
        self._rules = [
            *(landlock.rule(path, rights) for path, rights in permitted),
            *(landlock.rule(path, WRITE) for path in _distinct(confinement.writable)),
            landlock.rule(Path(_DISCARDING), Right.READ_FILE | Right.WRITE_FILE | Right.TRUNCATE),
        ]

    def enter(self) -> None:
        """Confine the template, before any of the agent's code runs, also at its import."""
        _give_up_privileges()
        self._use_for_temporary_files(self._scratch)
        own = landlock.rule(self._scratch, READ)
        landlock.restrict(READ, [*self._rules, own])
        os.close(own.fd)
        seccomp.install([os.getppid(), os.getpid()])

    def enter_worker(self) -> None:
        """Confine a worker: it has the name of its directory in TMPDIR, and whoever outlives it deletes it."""
        own = self._scratch / f"{scratch_prefix(os.getpid())}{os.urandom(4).hex()}"
        own.mkdir(mode=0o700)
        self._use_for_temporary_files(own)
        rules = [*self._rules, landlock.rule(own, (READ | WRITE) & ~Right.EXECUTE)]
        landlock.restrict(EVERYTHING, rules)
        _close(rules)

    @staticmethod
    def _use_for_temporary_files(directory: Path) -> None:
        os.environ["TMPDIR"] = str(directory)
        tempfile.tempdir = None  # it is looked up again


def scratch_prefix(pid: int) -> str:
    """Return how the name of a worker's own directory begins."""
    return f"{pid}-"


def _give_up_privileges() -> None:
    """Have no capabilities, which root's processes have all of, and no way to any: some pass by what Landlock says."""
    header = struct.pack("=Ii", _CAPABILITIES_VERSION_3, 0)
    sets = ctypes.create_string_buffer(_CAPABILITY_SETS_BYTES)
    refused = _libc.capget(header, sets) == -1
    if any(sets.raw):  # else it need not be permitted to
        refused |= _libc.capset(header, bytes(_CAPABILITY_SETS_BYTES)) == -1
    if refused or _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == -1:
        raise OSError(ctypes.get_errno(), "privileges cannot be given up")


def _interpreter() -> Iterator[str]:
    """Yield where this interpreter and its libraries are."""
    yield from (sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(__file__).parents[2]))
    yield from filter(None, sys.path)


def _environment() -> Iterator[str]:
    for name in _NAMED_BY_THE_ENVIRONMENT:
        if path := os.environ.get(name):
            yield path


def _distinct(paths: Iterable[str | Path]) -> list[Path]:
    """Return those that exist, each once and without links."""
    return sorted({path.resolve() for path in map(Path, paths) if path.exists()})


def _close(rules: Sequence[Rule]) -> None:
    for rule in rules:
        os.close(rule.fd)
