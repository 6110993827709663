"""The faults: what is done to whom, and what the log of a struck call may say of it."""

import signal
from typing import Literal, TypeAlias

from msgspec import Struct

from tests.chaos import strikes
from tests.chaos.stage import Props
from tests.chaos.strikes import Strike
from tests.chaos.verdict import TAKES_OVER

Scope: TypeAlias = Literal["each", "all", "own", "dialogd", "next"]
Outcome: TypeAlias = Literal["goes on", "fallback"]


class Fault(Struct, frozen=True):
    """A row of the table.

    `scope`: a fault of one call strikes `each` of ten in its turn, while the other nine talk, or `all` at once, or each at a
    moment of its `own`; one of `dialogd` strikes once, and with it ten calls; and one of what a new call needs strikes
    before the `next` call, ten times, while five others talk. So ten conversations are struck each time, which is what the
    table counts.
    `may_log`: how warnings and errors may begin in the log of a struck call, `may_say` in that of dialogd itself.
    `may_leave`: what there may be more of afterwards.
    `timed`: how long we need ourselves until the caller hears the next worker is measured.
    `may_repeat`: the caller may have to ask again, because what it said was lost on the way.
    """

    name: str
    strike: Strike
    scope: Scope = "each"
    outcome: Outcome = "goes on"
    may_log: tuple[str, ...] = ()
    may_say: tuple[str, ...] = ()
    may_repeat: bool = False
    may_leave: tuple[str, ...] = ()
    timed: bool = False
    props: Props = Props()


_REPLACED = (TAKES_OVER,)
_HANGS = (TAKES_OVER, "worker's event loop does not turn", "worker hangs and is killed")
_FAILS = (TAKES_OVER, "the agent failed")
_CRASHES_IN_C = (TAKES_OVER, "Fatal Python error", "Current thread", "Thread 0x", "  File", "Extension modules")
_GARBAGE = (TAKES_OVER, "worker breaks the protocol and is killed")
_HALF_A_VOICE = ("stt: Deepgram: no answer to a voice",)  # that broke off in mid-sentence
_DEAF = (TAKES_OVER, "worker is behind", "worker does not read and is killed", *_HALF_A_VOICE)
_LATE = ("worker is behind", "media_dropped")  # with what was said before there was one
_CUT = ("media socket lost", "Twilio reports an error")
_MUTE = ("media socket lost", "nothing comes from the carrier", *_HALF_A_VOICE)
_TEMPLATE = ("the template process",)
_LOST = ("the store", "calls are not kept for another dialogd")
_TAKEN_UP = ("a call is taken up that another dialogd left",)
_PREVIOUS = ("1 snapshots",)  # of the code before, for a rollback
_POOLED = ("1 socket",)  # to the carrier's API, kept for the next request
_REFUSED = ("the reload failed",)
_TENFOLD = (*_HANGS, *_FAILS, *_CRASHES_IN_C, *_GARBAGE, *_DEAF, *_CUT)
_LITTLE_MEMORY = Props({"workers": {"memory": 300_000_000}})  # bytes that a bomb may fill: more only takes longer
_SMALL_DISK = Props(disk_bytes=16_000_000)

_TEN = (
    strikes.send(signal.SIGKILL),
    strikes.send(signal.SIGSEGV),
    strikes.send(signal.SIGSTOP),
    strikes.cut,
    *map(strikes.press, "125789"),
)

FAULTS = (
    Fault("SIGKILL", strikes.send(signal.SIGKILL), may_log=_REPLACED),
    Fault("SIGKILL in thought", strikes.send_in_thought(signal.SIGKILL), may_log=_REPLACED, timed=True),
    Fault("SIGSEGV", strikes.send(signal.SIGSEGV), may_log=_CRASHES_IN_C),
    Fault("SIGSTOP", strikes.send(signal.SIGSTOP), may_log=_HANGS),
    Fault("exit(0)", strikes.press("8"), may_log=_REPLACED),
    Fault("agent leaves", strikes.press("0"), may_log=_REPLACED),
    Fault("exception in a handler", strikes.press("1"), may_log=_FAILS),
    Fault("infinite loop", strikes.press("2"), may_log=_HANGS),
    Fault("memory bomb", strikes.press("3"), may_log=_FAILS, props=_LITTLE_MEMORY),
    Fault("fork bomb", strikes.press("4"), may_log=(*_HANGS, "the agent failed", "worker left processes behind")),
    Fault("descriptor leak", strikes.press("5"), may_log=_FAILS),
    Fault("pipe flood", strikes.press("6"), may_log=_GARBAGE),
    Fault("garbage on the pipe", strikes.press("7"), may_log=_GARBAGE),
    Fault("full pipe", strikes.when_next(strikes.press("9"), "agent", after_s=0.3), may_log=_DEAF, may_repeat=True),
    Fault("template killed", strikes.signal_template(signal.SIGKILL), "next", may_say=_TEMPLATE),
    Fault("template stopped", strikes.signal_template(signal.SIGSTOP), "next", may_log=_LATE, may_say=_TEMPLATE),
    Fault("code that does not import", strikes.load_broken_code, "next", may_say=_REFUSED),
    Fault(
        "code that crashes each call",
        strikes.load_crashing_code,
        "next",
        "fallback",
        may_log=(*_FAILS, "worker died"),
        may_repeat=True,
        may_leave=_PREVIOUS,
    ),
    Fault("reload during a crash", strikes.kill_and_reload, may_log=_REPLACED, may_leave=_PREVIOUS),
    Fault("supervisor SIGKILL", strikes.kill_dialogd, "dialogd", may_log=_TAKEN_UP, may_repeat=True),
    Fault("supervisor re-exec", strikes.upgrade_dialogd, "dialogd"),
    Fault("disk full", strikes.fill_disk, "dialogd", may_log=_LOST, may_say=(*_LOST, *_REFUSED), props=_SMALL_DISK),
    Fault("store deleted", strikes.delete_store, "dialogd", may_log=_LOST, may_say=_LOST),
    Fault("clock stepped", strikes.step_clock, "dialogd", props=Props(own_clock=True)),
    Fault("carrier socket cut", strikes.cut, may_log=_CUT),
    Fault(
        "carrier silent",
        strikes.when_next(strikes.mute, "agent", after_s=0.3),
        may_log=_MUTE,
        may_repeat=True,
        may_leave=_POOLED,
    ),
    Fault("ten faults at once", strikes.one_each(*_TEN), "all", may_log=_TENFOLD, may_repeat=True),
)
