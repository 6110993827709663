"""`dialogctl load`: place many calls at a running dialogd whose agent echoes, and measure what comes back and what it costs.

Every frame carries the time of its sending, so its return says how long the server took, and a frame that never returns is
known. The generator runs on the same machine as the server and states its own CPU time too.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import trio
from cyclopts import App, Parameter
from msgspec import Struct

from dialog_local.load.callers import STRAGGLERS_S, LoadCall, Meter, Pacer
from dialog_local.load.server import ControlSocket, NotFound, memory, tree, usage
from dialog_local.load.wire import CallFailed, Target
from dialog_local.outcome import complain, first_of
from dialog_supervisor.config import Config, ConfigError, load, split_address
from protocol.readiness import Readers

SETTLE_S = 1.0  # from the last call's first echo until measuring begins, for a steady state
REASONS = 3  # that are shown when calls fail
VOICE_PATH = "/twilio/voice"
_ACCOUNT = "AC" + "0" * 32
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # what a server listens on, seen from here


class Percentiles(Struct, frozen=True):
    """Of milliseconds: half of them, 95 %, 99 % and all are not above these."""

    p50: float
    p95: float
    p99: float
    max: float


class Cost(Struct, frozen=True):
    """What the server's processes took. CPU in milliseconds for each call and second of it, memory (PSS) in MB of 10^6."""

    supervisor_cpu_ms: float
    tree_cpu_ms: float
    idle_mb: float
    loaded_mb: float
    per_call_mb: float
    processes: int


class Result(Struct, frozen=True):
    """What was measured. Percentiles are None when there is nothing to take them of."""

    calls: int
    answered: int
    failed: int
    reasons: list[str]
    seconds: float
    frames_sent: int
    frames_echoed: int
    frames_lost: int
    echo_ms: Percentiles | None
    webhook_ms: Percentiles | None
    first_echo_ms: Percentiles | None
    cost: Cost | None
    generator_cpu_ms: float

    def fault(self) -> str:
        """Return why this is no success, "" if it is one."""
        if self.failed:
            return f"{self.failed} of {self.calls} calls failed: {'; '.join(self.reasons)}"
        if self.frames_lost:
            return f"{self.frames_lost} of {self.frames_sent} frames did not come back within {STRAGGLERS_S:g} s"
        return ""


class Forks(Struct, frozen=True):
    """How soon workers were ready, in calls placed one after another."""

    calls: int
    hello_ms: Percentiles | None


class Load:
    """Calls that arrive one by one, talk at the same time, and are measured while all of them do."""

    def __init__(self, target: Target, pids: Sequence[int], calls: int, ramp_s: float) -> None:
        self._pids = pids
        self._ramp_s = ramp_s
        self._meter = Meter()
        self._pacer = Pacer()
        self._calls = [LoadCall(target, self._meter, self._pacer) for _ in range(calls)]

    async def run(self, seconds: float) -> Result:
        """Measure for so long. Raises `NotFound` for processes that are not there."""
        idle = memory(tree(self._pids))
        async with trio.open_nursery() as pacing:
            await pacing.start(Readers().run)  # which disturbs the server less than a task's wait for each frame
            pacing.start_soon(self._pacer.run)
            async with trio.open_nursery() as talking:
                first = trio.current_time()
                for number, call in enumerate(self._calls):
                    talking.start_soon(call.run, first + number * self._ramp_s)
                for call in self._calls:
                    await call.settled.wait()
                result = await self._measure(seconds, idle)
                for call in self._calls:
                    call.stop()
            pacing.cancel_scope.cancel()
        return self._with_failures(result)

    async def _measure(self, seconds: float, idle: int) -> Result:
        """Open the window, close it, and give what is under way the time to come back."""
        if not any(call.answered for call in self._calls):
            return self._result(0.0, None, 0.0)
        await trio.sleep(SETTLE_S)
        processes = tree(self._pids)
        before, own = usage(processes), time.process_time()
        self._meter.open()
        await trio.sleep(seconds)
        elapsed = self._meter.close()
        own, after = time.process_time() - own, usage(processes)
        with trio.move_on_after(STRAGGLERS_S):
            await self._meter.complete.wait()
        if not processes or after.cpu_s.keys() != before.cpu_s.keys():  # what a process used is gone with it
            return self._result(elapsed, None, own)
        loaded, answered = memory(processes), self._answered()
        per_call = 1000 / elapsed / answered
        cost = Cost(
            supervisor_cpu_ms=round(after.since(before, self._pids) * per_call, 2),
            tree_cpu_ms=round(after.since(before) * per_call, 2),
            idle_mb=round(idle / 1e6, 1),
            loaded_mb=round(loaded / 1e6, 1),
            per_call_mb=round((loaded - idle) / 1e6 / answered, 2),
            processes=len(processes),
        )
        return self._result(elapsed, cost, own)

    def _answered(self) -> int:
        return sum(call.answered for call in self._calls)

    def _result(self, elapsed: float, cost: Cost | None, own_cpu_s: float) -> Result:
        meter, answered = self._meter, self._answered()
        return Result(
            calls=len(self._calls),
            answered=answered,
            failed=0,
            reasons=[],
            seconds=round(elapsed, 2),
            frames_sent=meter.sent,
            frames_echoed=len(meter.echoes),
            frames_lost=meter.lost,
            echo_ms=percentiles(meter.echoes),
            webhook_ms=percentiles(meter.webhooks),
            first_echo_ms=percentiles(meter.first_echoes),
            cost=cost,
            generator_cpu_ms=round(own_cpu_s * 1000 / elapsed / answered, 2) if elapsed else 0.0,
        )

    def _with_failures(self, result: Result) -> Result:
        """Add what went wrong, the closing of the calls included; the commonest reasons first."""
        errors = Counter(call.error for call in self._calls if call.error)
        return msgspec.structs.replace(
            result, failed=errors.total(), reasons=[reason for reason, _ in errors.most_common(REASONS)]
        )


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """Return percentiles in milliseconds, or None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return Percentiles(
        *(round(ordered[min(len(ordered) - 1, int(len(ordered) * p))] * 1000, 2) for p in (0.5, 0.95, 0.99, 1))
    )


ConfigFile = Annotated[Path, Parameter(name=["-c", "--config"], env_var="DIALOG_CONFIG")]
Flag = Annotated[bool, Parameter(negative=())]

app = App(name="dialogctl load", help_format="plaintext")


@app.default
def load_test(
    *,
    calls: int = 40,
    seconds: float = 5.0,
    ramp: float = 0.2,
    forks: int = 0,
    url: str = "",
    token: str = "",
    account_sid: str = "",
    pid: Annotated[tuple[int, ...], Parameter(negative=())] = (),
    json: Flag = False,
    config: ConfigFile = Path("dialog.toml"),
) -> int:
    """Place many calls at a dialogd whose agent echoes (examples/echo), and measure what comes back and what it costs.

    Parameters
    ----------
    calls
        How many calls talk at the same time.
    seconds
        How long to measure, once all of them do.
    ramp
        Seconds from one call's arrival to the next.
    forks
        Instead, place so many calls one after another, and time how soon each one's worker is ready.
    url
        The voice webhook to call (http), instead of the configured dialogd.
    token
        The auth token to sign with, instead of the configured one.
    account_sid
        The account's SID, instead of the configured one.
    pid
        A process to measure, with its descendants, instead of the configured dialogd; repeatable, the supervisor first.
    json
        Print the figures as JSON.
    config
        The configuration file that dialogd runs with; not read when --url and --token are given.
    """
    if usage_error := _usage_error(calls, seconds, ramp, forks, url):
        return complain("dialogctl load", usage_error, 2)
    expected: BaseException | None = None
    try:
        configured = None if url and token and not forks else load(config)
        target = _target(configured, url, token, account_sid)
        result: Result | Forks
        if forks:
            result = Forks(forks, percentiles(trio.run(_control(configured).time_workers, target, forks)))
        else:
            pids = pid or ((_control(configured).pid(),) if configured else ())
            result = trio.run(Load(target, pids, calls, ramp).run, seconds)
    except* (ConfigError, NotFound, CallFailed, OSError, KeyboardInterrupt) as group:
        expected = first_of(group)
    if expected is not None:
        return 130 if isinstance(expected, KeyboardInterrupt) else complain("dialogctl load", str(expected), 1)
    print(msgspec.json.format(msgspec.json.encode(result)).decode() if json else describe(result))
    fault = result.fault() if isinstance(result, Result) else ""
    return complain("dialogctl load", fault, 1) if fault else 0


def _usage_error(calls: int, seconds: float, ramp: float, forks: int, url: str) -> str:
    """Return what is wrong with the options, "" for nothing."""
    if calls < 1 or seconds <= 0 or ramp < 0 or forks < 0:
        return f"--calls {calls} --seconds {seconds:g} --ramp {ramp:g} --forks {forks}: must be positive (ramp may be 0)"
    if url and (urlsplit(url).scheme != "http" or not urlsplit(url).hostname):
        return f"--url {url}: must be an http address, such as http://127.0.0.1:8080/twilio/voice; TLS is not spoken here"
    return ""


def _target(config: Config | None, url: str, token: str, account_sid: str) -> Target:
    """Return what to call, as configured where the options do not say it. Raises `ConfigError`."""
    token = token or (config.twilio.auth_token if config else "")
    account_sid = account_sid or (config.twilio.account_sid if config else _ACCOUNT)
    if url or config is None:
        parts = urlsplit(url)
        return Target(url, (parts.hostname or "", parts.port or 80), account_sid, token)
    if config.gateway.certificate:
        raise ConfigError(
            f"{config.file}: gateway.certificate: the load generator does not speak TLS; "
            "measure a configuration without certificate and key"
        )
    host, port = split_address(config.gateway.listen)
    return Target(config.gateway.public_url.rstrip("/") + VOICE_PATH, (_ANY.get(host, host), port), account_sid, token)


def _control(config: Config | None) -> ControlSocket:
    if config is None:
        raise AssertionError("unreachable: the configuration is read whenever the control socket is asked")
    return ControlSocket(config.control.socket)


def describe(result: Result | Forks) -> str:
    """Return the figures as lines for people."""
    if isinstance(result, Forks):
        return f"fork to Hello    {_milliseconds(result.hello_ms)}  ({result.calls} calls one after another)"
    cost = result.cost
    lines = [
        f"calls            {result.answered} of {result.calls} answered, {result.failed} failed",
        f"frames           {result.frames_sent} sent, {result.frames_echoed} echoed, {result.frames_lost} lost, "
        f"in {result.seconds:g} s",
        f"echo             {_milliseconds(result.echo_ms)}",
        f"webhook          {_milliseconds(result.webhook_ms)}",
        f"start to echo    {_milliseconds(result.first_echo_ms)}",
    ]
    if cost is not None:
        lines += [
            f"CPU              {cost.supervisor_cpu_ms:g} ms supervisor, {cost.tree_cpu_ms:g} ms with all its processes, "
            "for each call and second",
            f"memory           {cost.per_call_mb:g} MB a call; {cost.idle_mb:g} MB idle, {cost.loaded_mb:g} MB loaded (PSS)",
            f"processes        {cost.processes}",
        ]
    return "\n".join([*lines, f"load generator   {result.generator_cpu_ms:g} ms CPU for each call and second"])


def _milliseconds(found: Percentiles | None) -> str:
    return f"p50 {found.p50:g}  p95 {found.p95:g}  p99 {found.p99:g} ms" if found else "-"


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
