"""Signals that are read: none is lost to another thread, in an exec, or at the end. Each test is a process of its own."""

import subprocess
import sys

HEAD = """
import os, signal, sys, threading, time
import trio
from dialog_supervisor.signals import Signals
HUP, TERM, INT = signal.SIGHUP, signal.SIGTERM, signal.SIGINT

def read(signals):
    async def once():
        with trio.fail_after(5):
            return await anext(signals)
    print(trio.run(once).name, flush=True)
"""

BOTH = """
with Signals([HUP]) as hangups, Signals([TERM, INT]) as stops:
    for number in (INT, HUP):
        os.kill(os.getpid(), number)
    read(hangups)
    read(stops)
"""


def said(body: str) -> list[str]:
    """Return the lines that a program writes, which has to end well."""
    done = subprocess.run([sys.executable, "-c", HEAD + body], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_each_is_read_where_it_belongs() -> None:
    assert said(BOTH) == ["SIGHUP", "SIGINT"]


def test_who_was_started_with_one_ignored_reads_it() -> None:
    ignoring = """
if "again" not in sys.argv:
    signal.signal(INT, signal.SIG_IGN)
    os.execv(sys.executable, [*sys.orig_argv, "again"])
"""
    assert said(ignoring + BOTH) == ["SIGHUP", "SIGINT"]


def test_who_waits_is_told() -> None:
    assert said("""
with Signals([HUP]) as hangups:
    threading.Thread(target=lambda: (time.sleep(0.1), os.kill(os.getpid(), HUP))).start()
    read(hangups)
""") == ["SIGHUP"]


def test_what_comes_before_an_exec_is_read_after_it() -> None:
    assert said(
        """
with Signals([TERM]) as stops:
    if "again" in sys.argv:
        read(stops)
    else:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # which must not take it
        os.kill(os.getpid(), TERM)
        os.execv(sys.executable, [*sys.orig_argv, "again"])
"""
    ) == ["SIGTERM"]


def test_what_comes_last_cuts_nothing_short() -> None:
    assert said("""
with Signals([TERM]):
    pass
os.kill(os.getpid(), TERM)
print("ended")
""") == ["ended"]
