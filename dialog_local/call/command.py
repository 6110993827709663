"""`dialogctl call`: place a call on this machine, hear what the agent makes of it, and see where the time went.

It is a phone company and a caller in one process. Any dialogd can be called; with its configuration at hand, the agent's own
account of the call is shown too.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import trio
from cyclopts import App, Parameter, Token
from rich.console import Console

from dialog_local.call import report
from dialog_local.call.report import Summary
from dialog_local.call.script import read_script
from dialog_local.call.session import Failed, Line, Session, Target
from dialog_local.call.speech_client import SpeechUnavailable
from dialog_local.outcome import complain, first_of
from dialog_local.speech.audio import UnreadableAudio
from dialog_supervisor.config import ConfigError, load, split_address

PASSING_SHARE = 0.8  # of the agent's words; the recogniser's own mistakes on telephone audio take the rest
_ACCOUNT = "AC" + "0" * 32


def _turns(_type: Any, tokens: Sequence[Token]) -> tuple[Line, ...]:
    """Keep `--say` and `--wav` in the order of the command line, which two parameters would lose."""
    return tuple(Line("--wav" if token.keyword == "--wav" else "--say", token.value) for token in tokens)


ConfigFile = Annotated[Path, Parameter(name=["-c", "--config"], env_var="DIALOG_CONFIG")]
Turns = Annotated[
    tuple[Line, ...],
    Parameter(name=["--say", "--wav"], converter=_turns, n_tokens=1, accepts_keys=False, negative=(), show_default=False),
]
Flag = Annotated[bool, Parameter(negative=())]


@Parameter(name="*")
@dataclass(frozen=True)
class Elsewhere:
    """Another dialogd than the configured one.

    Parameters
    ----------
    url
        A voice webhook to call instead of the configured dialogd; needs --token.
    token
        The auth token to sign with, for --url.
    account_sid
        The account's SID, for --url.
    """

    url: str = ""
    token: str = ""
    account_sid: str = ""

    def target(self) -> Target:
        """Return where to call. Raises `Failed`."""
        if urlsplit(self.url).scheme not in {"http", "https"} or not urlsplit(self.url).hostname:
            raise Failed(f"--url {self.url}: is not an address such as https://voice.example.com/twilio/voice")
        return Target(self.url, self.account_sid or _ACCOUNT, self.token)


_CONFIGURED = Elsewhere()
app = App(name="dialogctl call", help_format="plaintext")


@app.default
def call(
    *,
    turns: Turns = (),
    script: Path | None = None,
    text: Flag = False,
    interrupt: Annotated[tuple[int, ...], Parameter(negative=(), show_default=False)] = (),
    out: Path | None = None,
    from_: Annotated[str, Parameter(name="--from")] = "+15550001111",
    to: str = "+15550002222",
    elsewhere: Elsewhere = _CONFIGURED,
    check: Flag = False,
    max_seconds: float = 300.0,
    wait: float = 0.0,
    json: Flag = False,
    config: ConfigFile = Path("dialog.toml"),
) -> int:
    """Place a call on this machine and hear the answer.

    Parameters
    ----------
    turns
        What the caller says: words for the local voice, or a WAV file. Repeat either, in the order of the conversation.
    script
        Read what the caller says from a file: a line a turn; "!" before it says it over the agent's words, "#" is a comment.
    text
        Type what the caller says, line by line; an empty line hangs up.
    interrupt
        Say turn N over the agent's words instead of after them. Repeatable.
    out
        Write the call to a stereo WAV file: the caller left, the agent right.
    from_
        The caller's number.
    to
        The number called.
    elsewhere
        Another dialogd than the configured one.
    check
        Fail unless 80 % of the words that the agent said are recognised in its voice.
    max_seconds
        Hang up after that long.
    wait
        Give dialogd and the speech server so many seconds to start.
    json
        Print the summary as JSON, and nothing else on stdout.
    config
        The configuration file that dialogd runs with.
    """
    console = Console(stderr=json, highlight=False, markup=False, emoji=False)
    if usage := _usage_error(turns, script, text=text, interrupt=interrupt, elsewhere=elsewhere):
        return complain("dialogctl call", usage, 2)

    def converse() -> Summary:
        target = elsewhere.target() if elsewhere.url else _configured(config)
        session = Session(target, console, from_, to, out, check=check, max_seconds=max_seconds, wait=wait)
        if script is None:
            return trio.run(session.run, turns, text, interrupt)
        read = read_script(script)
        return trio.run(session.run, read.lines, text, read.interrupt)

    return _outcome(converse, console, json=json, check=check)


def _outcome(converse: Callable[[], Summary], console: Console, *, json: bool, check: bool) -> int:
    """Have the conversation, print its summary or why there is none, and return the exit code."""
    expected: BaseException | None = None
    try:
        summary = converse()
    except* (Failed, ConfigError, SpeechUnavailable, UnreadableAudio, KeyboardInterrupt) as group:
        expected = first_of(group)
    if isinstance(expected, KeyboardInterrupt):
        return 130
    if expected is not None:
        return complain("dialogctl call", str(expected), 1)
    if json:
        print(msgspec.json.format(msgspec.json.encode(summary)).decode())
    else:
        report.print_summary(console, summary)
    doubt = _check_failure(summary) if check else ""
    return complain("dialogctl call", doubt, 1) if doubt else 0


def _usage_error(
    turns: Sequence[Line], script: Path | None, *, text: bool, interrupt: tuple[int, ...], elsewhere: Elsewhere
) -> str:
    """Return what is wrong with a combination of options, "" for nothing."""
    if [bool(turns), script is not None, text].count(True) != 1:
        return "say something: give --say TEXT or --wav FILE (repeatedly), --script FILE, or --text to type"
    if script is not None and interrupt:
        return "--interrupt goes with --say and --wav; in a --script, write '!' before the turn"
    if unknown := next((number for number in interrupt if not 1 <= number <= len(turns)), None):
        return f"--interrupt {unknown}: there are {len(turns)} turns; give the number of one"
    if elsewhere.url and not elsewhere.token:
        return f"--url {elsewhere.url} needs --token: the auth token that its webhooks are signed with"
    return ""


def _configured(file: Path) -> Target:
    """Read where dialogd listens. Raises `ConfigError`."""
    config = load(file)
    host, port = split_address(config.gateway.listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # what it listens on, seen from here
    netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    rest = urlsplit(config.twilio.api_url)
    local_rest = rest.hostname in {"127.0.0.1", "localhost", "::1"} and rest.port is not None
    return Target(
        config.gateway.public_url.rstrip("/") + "/twilio/voice",
        config.twilio.account_sid,
        config.twilio.auth_token,
        via=f"{'https' if config.gateway.certificate else 'http'}://{netloc}",
        rest_address=(str(rest.hostname), int(rest.port or 0)) if local_rest else None,
        control_socket=config.control.socket,
        start_command=f"dialogd -c {file}",
    )


def _check_failure(summary: Summary) -> str:
    match = summary.words
    if match is None:
        return "--check: what the agent said is not known; it needs dialogd's control socket, and an agent that speaks"
    if match.share < PASSING_SHARE:
        return (
            f"--check: {match.heard} of the {match.said} words that the agent said were recognised ({match.share:.0%}, "
            f"at least {PASSING_SHARE:.0%} are needed); it sounded like: {match.recognised!r}"
        )
    return ""


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
