"""The command line: `dialogd` runs the supervisor, `dialogctl` asks a running one.

Exit codes: 0 done, 1 refused or failed with a reason on stderr, 2 usage.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import trio
from cyclopts import App, CycloptsError, Parameter

from dialog_supervisor import logs as logging
from dialog_supervisor.config import ConfigError, load
from dialog_supervisor.control import rehearsal, watching
from dialog_supervisor.control.asking import CONFIG_VARIABLE, Failed, ask, print_json
from dialog_supervisor.snapshot import GenerationFailed

_COMMANDS = "dialogctl.commands"  # the entry points of those commands
_DEFAULT_FILE = Path("dialog.toml")
_UPGRADE_TIMEOUT_S = 90.0  # the new version has a minute to read the state, and the carrier 15 s to leave it alone
_POLL_S = 0.1
_SWAP_TIMEOUT_S = 180.0  # the agent's imports may take a minute, and another reload may come first

ConfigFile = Annotated[Path, Parameter(name=["-c", "--config"], env_var=CONFIG_VARIABLE)]
HandedFd = Annotated[int, Parameter(show=False)]
AsJson = Annotated[bool, Parameter(name="--json", negative=())]
Follow = Annotated[bool, Parameter(name="--follow", negative=())]
Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]

daemon = App(name="dialogd", help="Run the supervisor of telephone voice agents.", help_format="plaintext")
control = App(name="dialogctl", help="Ask a running dialogd, or place calls to it.", help_format="plaintext")
control.meta.help_flags = ()  # each command explains itself, also those of other rooms


@daemon.default
def run(
    *,
    config: ConfigFile = _DEFAULT_FILE,
    watch: Annotated[bool, Parameter(negative=())] = False,
    handover: HandedFd | None = None,
    check_handover: HandedFd | None = None,
) -> None:
    """Take calls until SIGTERM or Ctrl-C.

    After SIGTERM the calls under way may end by themselves, for up to calls.drain_timeout; Ctrl-C brings their callers the
    fallback. A second signal stops at once.

    Parameters
    ----------
    config
        The configuration file.
    watch
        Reload when a file in the agent's directory changes, for development.
    handover
        The descriptor of what another version of this process has handed over.
    check_handover
        The same, only to say whether this version could go on with it.
    """
    from dialog_supervisor.supervisor import Supervisor  # noqa: PLC0415
    from dialog_supervisor.upgrade import execution as upgrading  # noqa: PLC0415 - half a second that --help need not wait for

    loaded = load(config)
    try:
        if check_handover is not None:
            upgrading.read(check_handover)
            return
        handed = None if handover is None else upgrading.receive(handover)
    except upgrading.UpgradeFailed as error:
        raise Failed(str(error)) from None
    logging.configure(loaded.log)

    async def serve() -> None:
        await Supervisor(loaded, watch=watch, handed=handed).run()

    failure: BaseException | None = None
    try:
        trio.run(serve)
    except* (ConfigError, GenerationFailed) as group:
        failure = _first(group)
    if failure is not None:  # raised here, because what is raised inside `except*` is put into a group again
        raise failure from None


@control.meta.default
def _launch(*tokens: Tokens, config: ConfigFile = _DEFAULT_FILE) -> Any:
    """Ask a running dialogd, or place calls to it.

    Parameters
    ----------
    config
        The configuration file that dialogd runs with.
    """
    os.environ[CONFIG_VARIABLE] = str(config)
    return control(tokens, exit_on_error=False, result_action="return_value")


@control.command
def status(*, json: AsJson = False, follow: Follow = False) -> None:
    """Show whether dialogd takes calls, and how many it has."""
    _shown(lambda: _show_status(json=json), follow=follow)


def _shown(show: Callable[[], None], *, follow: bool) -> None:
    if follow:
        watching.follow(show)
    else:
        show()


def _show_status(*, json: bool) -> None:
    found = ask("GET", "/status")
    if json:
        print_json(found)
        return
    print(
        f"dialogd {found['version']}, process {found['pid']}, up {found['uptime_s']:.0f} s, generation {found['generation']}"
    )
    print(_readiness(found))
    states = ", ".join(f"{count} {state}" for state, count in found["states"].items() if count)
    print(f"{found['calls']} calls{f' ({states})' if states else ''}, {found['workers']} workers{_memory(found)}")
    print(_machine(found["machine"]))
    print(_groups(found["cgroup"]))
    refused = ", ".join(f"{count} {reason}" for reason, count in found["refused"].items() if count)
    if refused:
        print(f"refused since the start: {refused}")
    for one in found["generations"]:
        if one["state"] in ("starting", "retiring", "canary"):
            print(f"generation {one['generation']} is {one['state']}, {one['calls']} calls")
        if one["trial"]:
            print("\n".join(_trial(one["trial"])))


def _memory(found: dict[str, Any]) -> str:
    """Return how much memory one or all workers have, and which count that is."""
    return "" if found["memory"] is None else f", {found['memory'] // 1_000_000} MB {found['memory_kind']}"


def _machine(found: dict[str, Any]) -> str:
    memory = "unknown" if found["free_memory"] is None else f"{found['free_memory'] // 1_000_000} MB"
    load = "unknown" if found["load"] is None else f"{found['load']:.1f} for each CPU"
    return f"{memory} of memory free, load {load}"


def _groups(found: dict[str, Any]) -> str:
    if found["path"] is None:
        return f"no control groups: {found['reason']}"
    return f"control groups in {found['path']}, limiting {', '.join(found['controllers']) or 'nothing'}"


def _readiness(found: dict[str, Any]) -> str:
    if found["accepting"]:
        return "taking calls"
    why = "stopping" if found["stopping"] else "draining" if found["draining"] else "starting"
    return f"not taking calls: {why}"


@control.command
def metrics() -> None:
    """Print the figures that Prometheus reads."""
    print(ask("GET", "/metrics"), end="")


@control.command
def calls(*, json: AsJson = False, follow: Follow = False) -> None:
    """List the calls under way."""
    _shown(lambda: _show_calls(json=json), follow=follow)


def _show_calls(*, json: bool) -> None:
    found = ask("GET", "/calls")
    if json:
        print_json(found)
        return
    for one in found:
        numbers = f"{one['caller']} -> {one['callee']}"
        print(
            f"{one['id']}  {one['state']:<10} {one['seconds']:>7.1f} s  {numbers}  worker {one['worker_pid']}{_memory(one)}"
        )
    if not found:
        print("no calls")


@control.command(help_flags=())
def call(*tokens: Tokens) -> Any:
    """Show one call (dialogctl call ID [--follow] [--json]), or place one (dialogctl call --help)."""
    if tokens and not tokens[0].startswith("-") and set(tokens[1:]) <= {"--json", "--follow"}:
        _shown(lambda: _show_call(tokens[0], json="--json" in tokens), follow="--follow" in tokens)
        return 0
    return _other_room("call")(tokens, exit_on_error=False, result_action="return_value")


def _show_call(call_id: str, *, json: bool) -> None:
    found = ask("GET", f"/calls/{call_id}")
    if json:
        print_json(found)
    else:
        print("\n".join(f"{key:<12}{value}" for key, value in found.items()))


@control.command(name="load", help_flags=())
def load_test(*tokens: Tokens) -> Any:
    """Place many calls and measure (dialogctl load --help)."""
    return _other_room("load")(tokens, exit_on_error=False, result_action="return_value")


@control.command
def logs(call_id: str, *, json: AsJson = False, follow: Follow = False) -> None:
    """Show what happened in a call: its states, its workers and what became of them, turns, tools, requests, warnings.

    Of a call that is over, its event log tells. What is said is shown where log.transcripts or events.transcripts permit it.
    With --json, event logs are printed as they are.
    """
    watching.show_log(call_id, follow=follow, json=json)


@control.command
def replay(log: str, *, tools: bool = False, json: AsJson = False) -> int:
    """Play a call's event log against the agent's code as it is now, and show where it answers differently.

    The caller's words, keys and pauses are those of the log, and what the carrier answered; the agent's model is asked anew.
    Exit code 0: the same answers; 1: others.

    Parameters
    ----------
    log
        A call's id, or the file of its event log, which must have what was said in it (events.transcripts).
    tools
        Run the agent's tools. Without this, each returns what it returned in the call, and does nothing.
    """
    return rehearsal.replay(log, tools=tools, json=json)


@control.command
def hangup(call_id: str) -> None:
    """End a call."""
    ask("POST", f"/calls/{call_id}/hangup")
    print(f"{call_id} is ending")


@control.command
def drain(*, json: AsJson = False) -> None:
    """Take no other calls, without stopping: those under way go on, and new callers are given the fallback."""
    _admit("/drain", json=json)


@control.command
def undrain(*, json: AsJson = False) -> None:
    """Take calls again, after dialogctl drain."""
    _admit("/undrain", json=json)


def _admit(path: str, *, json: bool) -> None:
    found = ask("POST", path)
    if json:
        print_json(found)
    else:
        print(f"{_readiness(found)}; {found['calls']} calls")


@control.command
def generations(*, json: AsJson = False) -> None:
    """List the versions of the agent's code: hash and number of the load, age, calls, state, and how its calls went."""
    found = ask("GET", "/generations")
    if json:
        print_json(found)
        return
    for one in found:
        goal = "  (rollback returns to it)" if one["rollback"] else ""
        age = f"{one['age_s']:>9.0f} s"
        print(f"{one['generation']:<18}{one['state']:<10}{age}  {one['calls']} calls  {_figures(one['tally'])}{goal}")
        if one["trial"]:
            print("\n".join(f"  {line}" for line in _trial(one["trial"])))


def _figures(figures: dict[str, int]) -> str:
    calls = f"{figures['begun']} begun, {figures['crashed']} crashed"
    return f"{calls}; {figures['failed_turns']} of {figures['turns']} turns failed"


def _trial(trial: dict[str, Any]) -> Iterator[str]:
    """Yield how a canary does beside the code before it."""
    yield f"it takes {trial['share']} of 100 new calls, until {trial['calls']} went well: {trial['new']['well']} have"
    yield f"canary since then: {_figures(trial['new'])}"
    yield f"old code since then: {_figures(trial['old'])}; margin {trial['margin']:g} of 100"


@control.command
def reload(*, json: AsJson = False) -> None:
    """Have the next calls use the agent's code as it is now; calls under way keep theirs.

    The agent's directory is copied, imported and tried with a silent call. If any of it fails, nothing changes. With
    agent.canary, only a share of the calls use it until it is promoted or rolled back, by itself or by command.
    dialog.toml itself is read only when dialogd starts.
    """
    _swap("/reload", json=json)


@control.command
def rollback(*, json: AsJson = False) -> None:
    """Have no more calls use the canary's code; without a canary, have the next calls use the code that was current before.

    Without a canary, a second rollback undoes the first.
    """
    _swap("/rollback", json=json)


@control.command
def promote(*, json: AsJson = False) -> None:
    """Have all the next calls use the canary's code, without waiting for more evidence."""
    _swap("/promote", json=json)


def _swap(path: str, *, json: bool) -> None:
    found = ask("POST", path, timeout_s=_SWAP_TIMEOUT_S)
    if json:
        print_json(found)
        return
    new, old, seconds = found["generation"], found["previous"], f"{found['seconds']:.1f} s"
    if found["ended"]:
        print(f"the canary {found['ended']} has ended: its calls finish on its code, and no more begin on it")
    if found["canary"] is None:
        print(f"generation {new} serves the next calls, after {old}; {seconds}")
    else:
        print(f"generation {new} is a canary: it takes {found['canary']} of 100 new calls, {old} the others; {seconds}")


@control.command
def upgrade(*, json: AsJson = False) -> None:
    """Have dialogd go on as the version that is installed now, and with dialog.toml as it is now; calls notice nothing.

    The installed version is tried with the state of the calls first; if it cannot read that, nothing changes. Agents keep
    their code: dialogctl reload has the next calls use the new version's dialog_worker too.
    """
    before = ask("GET", "/status")
    ask("POST", "/upgrade", timeout_s=_UPGRADE_TIMEOUT_S)
    found = _upgraded(before["upgrades"])
    if json:
        told = ("version", "pid", "upgrades", "away_ms", "calls")
        print_json({key: found[key] for key in told} | {"previous": before["version"]})
    else:
        versions = f"dialogd {found['version']} goes on after {before['version']}"
        print(f"{versions} with {found['calls']} calls; they were not read for {found['away_ms']} ms")


def _upgraded(upgrades: int) -> dict[str, Any]:
    """Return the status of the version that follows after so many upgrades. Raises `Failed`."""
    give_up_at, why = time.monotonic() + _UPGRADE_TIMEOUT_S, "it has not said why"
    while time.monotonic() < give_up_at:
        try:
            found: dict[str, Any] = ask("GET", "/status")
        except Failed as error:  # between two versions nobody answers
            why = str(error)
        else:
            if found["upgrades"] > upgrades:
                return found
            if found["upgrade_failed"]:
                raise Failed(found["upgrade_failed"])
        time.sleep(_POLL_S)
    raise Failed(f"the upgrade is not done after {_UPGRADE_TIMEOUT_S:g} s: {why}")


def _other_room(name: str) -> Callable[..., Any]:
    """Return a command that an optional room adds. Raises `Failed` when what it needs is not installed."""
    try:
        [found] = entry_points(group=_COMMANDS, name=name)
        app: Callable[..., Any] = found.load()
    except (ImportError, ValueError) as error:
        raise Failed(
            f"dialogctl {name} needs the local providers ({error}); pip install 'dialog-supervisor[local]'"
        ) from None
    return app


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return one exception of a group of expected ones: they have the same cause."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _guarded(app: Callable[..., Any], name: str) -> int:
    """Run a command; what is expected to fail says so in one sentence."""
    try:
        code = app(sys.argv[1:], exit_on_error=False, result_action="return_value")
    except CycloptsError:  # already explained on stderr
        return 2
    except (ConfigError, Failed) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except GenerationFailed as error:
        print(f"{name}: the agent cannot serve calls:\n\n{error}\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0


def dialogd() -> None:
    """Entry point of `dialogd`."""
    sys.exit(_guarded(daemon, "dialogd"))


def dialogctl() -> None:
    """Entry point of `dialogctl`."""
    sys.exit(_guarded(control.meta, "dialogctl"))
