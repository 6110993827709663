"""The tables of dialog.toml: every key, its type, its default and its meaning. `docs/configuration.md` is made from them."""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class Secret(str):
    """A resolved secret. It never shows itself in a repr or a log."""

    def __repr__(self) -> str:
        return "'********'"


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the tables of dialog.toml: an unknown key is an error, not a silent default."""


class GatewayConfig(Section, frozen=True, kw_only=True):
    """`[gateway]`: the public listener, for webhooks and media sockets alike."""

    listen: str = "127.0.0.1:8080"
    """Address and port; put a TLS proxy in front, or give certificate and key. `{node}` stands for the node's name, so that
    several `dialogd`s can share a file: "127.0.0.1:808{node}"."""
    public_url: str
    """Scheme, host and port as the carrier's console has them: signatures are computed from it, never from `Host`."""
    node: str = ""
    """The name of this `dialogd` among several behind one `public_url`, letters and digits; by default $DIALOG_NODE, which
    the unit `dialogd@NAME` sets. The carrier is then told to ask below /n/NAME/ about this node's calls."""
    certificate: str | None = None
    """PEM file of the certificate chain, relative to dialog.toml; with `key`, the listener speaks TLS."""
    key: str | None = None
    """PEM file of the certificate's private key."""
    request_size_limit: Count = 1_000_000
    """Bytes of a webhook's body; more is answered 413."""
    message_size_limit: Count = 65_536
    """Bytes of one message on a media socket (a 20 ms frame takes about 300); more closes the socket with 1009."""
    max_connections: Count = 2_000
    """Connections open at a time; one more is answered 503."""
    request_timeout: Seconds = 10.0
    """Seconds for a whole request, head and body; slower is answered 408."""
    idle_timeout: Seconds = 60.0
    """Seconds that a kept-alive connection may be silent between requests."""


class TwilioConfig(Section, frozen=True, kw_only=True):
    """`[twilio]`: the account whose calls are taken."""

    account_sid: Annotated[str, Meta(pattern="^AC[0-9a-fA-F]{32}$")]
    """The account's SID: AC and 32 hexadecimal digits."""
    auth_token: Secret
    """The account's primary auth token: it signs what Twilio sends, and is the password of the REST API."""
    api_url: str = "https://api.twilio.com"
    """Where the REST API is."""
    timeout: Seconds = 10.0
    """Seconds for one REST request."""


class AgentConfig(Section, frozen=True, kw_only=True):
    """`[agent]`: the code that talks."""

    path: str
    """The directory that the agent's code is imported from, relative to dialog.toml."""
    entry: Annotated[str, Meta(pattern=r"^[\w.]+:\w+$")] = "agent:create"
    """Module and function; it is called with the call's `VoIP` and returns the agent."""
    python: str | None = None
    """The interpreter to run it with, e.g. of a virtual environment of its own; by default this one."""
    canary: Annotated[int, Meta(ge=0, le=100)] = 0
    """How many of a hundred new calls take reloaded code until it has proved itself; with 0 all do at once."""
    canary_calls: Count = 20
    """Calls of a canary that must end without a crash before all new calls take its code."""
    canary_margin: Annotated[float, Meta(ge=0, le=100)] = 5.0
    """By how many of a hundred calls that crash, or turns that fail, a canary may be worse than the old code in the same
    time; beyond that it is rolled back."""
    env: dict[str, Secret] = {}
    """Environment variables for the agent, where the environment does not set them; secrets by reference, as everywhere."""


class CallsConfig(Section, frozen=True, kw_only=True):
    """`[calls]`: how many calls there may be, and how long each state of one may take, in seconds."""

    max_calls: Count = 1_000
    """Calls at a time; one more is given the fallback. A call has a media socket and its webhooks' connection: no more than
    half of `gateway.max_connections`."""
    min_free_memory: Annotated[int, Meta(ge=0)] = 256_000_000
    """Bytes that the machine (MemAvailable), or the control group that dialogd runs in, must have left for another call."""
    max_load: Annotated[float, Meta(ge=0)] = 8.0
    """For another call, no more than so many processes and threads for each CPU, over the last seconds, that run or wait for
    it. Not the share of CPU that is used: a machine may be fully used and answer in time. With 0, it is not looked at."""
    connect_timeout: Seconds = 30.0
    """From the webhook's answer until the carrier has opened the media socket."""
    reconnect_timeout: Seconds = 10.0
    """From the loss of a media socket until the carrier has asked what to do and opened another."""
    silence_timeout: Seconds = 10.0
    """Without a message on the media socket; then the carrier is asked whether the call still lives, and to open another."""
    ending_timeout: Seconds = 10.0
    """For the carrier to follow a call's end to its last word."""
    callbacks_timeout: Seconds = 120.0
    """For the carrier to tell of recordings and transcriptions after a call that has any; the worker lives as long."""
    max_duration: Seconds = 14_400.0
    """For a whole call; Twilio's own default is four hours."""
    farewell_time: Seconds = 30.0
    """So long before `max_duration` is over the agent is told, to say goodbye."""
    restarts: Annotated[int, Meta(ge=0)] = 3
    """How many workers of one call may die within `restart_window` and be followed by another; then the caller is given the
    fallback. With 0, at once."""
    restart_window: Seconds = 60.0
    """Seconds in which `restarts` are counted."""
    shutdown_grace: Seconds = 5.0
    """For a worker to do what it does last, and to leave, once its call is over; then it is killed."""
    drain_timeout: Annotated[float, Meta(ge=0)] = 300.0
    """For calls under way to end by themselves after SIGTERM; then their callers are given the fallback. Whatever kills a
    `dialogd` that does not stop must wait longer: by twice `ending_timeout`, `shutdown_grace`, and a second."""


class WorkersConfig(Section, frozen=True, kw_only=True):
    """`[workers]`: what the process of one call may take of the machine."""

    memory: Count = 512_000_000
    """Bytes of its own, used or only set aside: RLIMIT_DATA, which counts what the agent's imports took, and libraries not;
    a thread sets aside 8 MB. A worker that is refused more fails, and is followed by another."""
    processes: Count = 256
    """Processes and threads at a time in one call, its own included: where dialogd may make control groups, no more can be
    started; elsewhere a worker with more is killed when that is seen, within seconds."""
    cpu_seconds_per_minute: Seconds = 45.0
    """CPU time that one call may take in any minute, with all that it starts; four threads that compute take 240. More of it
    is a warning with the worker's stack, and if it goes on, the worker is followed by another."""
    open_files: Count = 1_024
    """Files, sockets and pipes open at a time (RLIMIT_NOFILE)."""
    core_dumps: bool = False
    """Whether its memory, with what the caller said, may be written to disk when it crashes, and be looked at by debuggers
    and profilers (`dialogctl load` too) of the user that it runs as; root's always may."""
    sandbox: bool = False
    """Whether the agent's code, from its import on, is kept from files that it need not see and from system calls that reach
    out of its process; see operations.md. Linux 5.13 and later."""
    readable: tuple[Path, ...] = ()
    """Files and directories that agents may read in the sandbox, beside their code, Python and the system's libraries."""
    writable: tuple[Path, ...] = ()
    """Those that they may also change there, beside a directory for temporary files that each call has of its own."""


class FallbackConfig(Section, frozen=True, kw_only=True):
    """`[fallback]`: what a caller gets whose agent is gone. `dial` wins over `say`; with neither, the call ends."""

    say: str = "We are sorry, something went wrong. Please call again in a moment."
    """Words for the carrier's own voice."""
    dial: str | None = None
    """A number (E.164) to connect the caller to."""
    busy_say: str = "All our lines are busy. Please call again in a few minutes."
    """Words for a caller whose call is not taken: there are too many, or `dialogd` is being stopped."""
    busy_dial: str | None = None
    """A number (E.164) for such a caller; by default that of `dial`, and with "" none."""


class TransferConfig(Section, frozen=True, kw_only=True):
    """`[transfer]`: whom agents may connect callers to."""

    allow: tuple[str, ...] = ()
    """Numbers (E.164) and SIP addresses, whole or as "+1555*" and "sip:*@example.com". Empty, as it is, allows nobody."""


class RecordingsConfig(Section, frozen=True, kw_only=True):
    """`[recordings]`: where the recordings go that agents have downloaded."""

    directory: Path = Path()
    """By default $STATE_DIRECTORY/recordings, else `recordings` beside dialog.toml; made when it is needed."""
    format: Literal["wav", "mp3"] = "wav"
    """What is asked of the carrier; dual channels stay apart in both."""
    size_limit: Count = 1_000_000_000
    """Bytes of one recording; the rest of a longer one is not downloaded, and the agent is told so."""


class StoreConfig(Section, frozen=True, kw_only=True):
    """`[store]`: where calls under way are kept, so that another `dialogd` goes on with them when this one dies."""

    enabled: bool = True
    """Whether they are."""
    path: Path = Path()
    """The file; by default $STATE_DIRECTORY/calls.sqlite, else one named for this configuration file in
    $XDG_STATE_HOME/dialog, which is ~/.local/state/dialog as a rule. It is on a disk of this machine, only its user may read
    it, and several `dialogd`s may share it. A call is deleted from it when it ends."""


class EventsConfig(Section, frozen=True, kw_only=True):
    """`[events]`: an event log for each call, which `dialogctl logs` and `dialogctl replay` read."""

    directory: Path = Path()
    """By default $STATE_DIRECTORY/events; where there is neither, none are kept. For the user of `dialogd` alone."""
    transcripts: bool = False
    """Whether they hold what is said, numbers, and keys pressed: what a replay needs, and what callers may have to be told.
    Without, they tell who spoke when and what was done."""
    size_limit: Count = 10_000_000
    """Bytes of one call's; what is beyond is left out."""
    keep_days: Seconds = 14.0
    """Days that one is kept."""
    keep_calls: Annotated[int, Meta(ge=0)] = 10_000
    """How many are kept at most, the latest ones; with 0 none."""


class ControlConfig(Section, frozen=True, kw_only=True):
    """`[control]`: where dialogctl finds dialogd, and Prometheus its figures."""

    socket: Path = Path()
    """A unix socket; by default $RUNTIME_DIRECTORY/control.sock, else one named for this configuration file and the node.
    `{node}` stands for the node's name."""
    listen: str | None = None
    """Address and port, such as "127.0.0.1:9090", where `/metrics`, `/healthz` and `/readyz` are served, and nothing else:
    figures, to be read by whoever can connect. `{node}` is as in `socket`, which has `/metrics` in any case."""


class LogConfig(Section, frozen=True, kw_only=True):
    """`[log]`: what is written to stderr."""

    format: Literal["auto", "json", "console"] = "auto"
    """`auto` is readable on a terminal and JSON lines elsewhere."""
    level: Literal["debug", "info", "notice", "warning", "error"] = "info"
    """The least that is written."""
    transcripts: bool = False
    """Whether what is said may appear in the log."""


class Tables(Section, frozen=True, kw_only=True):
    """All that dialog.toml may say."""

    gateway: GatewayConfig
    twilio: TwilioConfig
    agent: AgentConfig
    calls: CallsConfig = CallsConfig()
    workers: WorkersConfig = WorkersConfig()
    fallback: FallbackConfig = FallbackConfig()
    transfer: TransferConfig = TransferConfig()
    recordings: RecordingsConfig = RecordingsConfig()
    store: StoreConfig = StoreConfig()
    events: EventsConfig = EventsConfig()
    control: ControlConfig = ControlConfig()
    log: LogConfig = LogConfig()
