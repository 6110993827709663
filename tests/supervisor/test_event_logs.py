"""Where event logs are written, who can read them, and which are removed."""

import os
from collections import Counter
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from dialog_supervisor.sections import EventsConfig
from dialog_supervisor.telemetry import event_logs, metrics
from dialog_supervisor.telemetry.call_log import CallLog
from dialog_supervisor.telemetry.event_logs import EventLogs, expired, find
from protocol.messages import Dtmf
from protocol.record import read

DAY_S = 86_400.0


def begin(logs: EventLogs, call_id: str = "CA1") -> CallLog:
    begun = logs.begin(call_id, "abc.1", Counter())
    assert begun is not None
    return begun


async def write(logs: EventLogs) -> None:
    """Have what there is written, as at dialogd's end."""
    with trio.move_on_after(0):
        await logs.run()


def lost() -> float:
    return metrics.REGISTRY.get_sample_value("dialog_events_lost_total") or 0.0


async def test_a_call_s_log_is_for_its_user_alone(tmp_path: Path) -> None:
    logs = EventLogs(EventsConfig(directory=tmp_path / "state" / "events"))
    one = begin(logs)
    one.told(Dtmf("5"), 7)
    one.close()
    await write(logs)
    [file] = find(tmp_path / "state" / "events", "CA1")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert read(file)[0].call == "CA1"


@pytest.mark.parametrize("config", [EventsConfig(), EventsConfig(directory=Path("/nowhere"), keep_calls=0)])
async def test_where_none_are_to_be_kept_there_are_none(config: EventsConfig) -> None:
    assert EventLogs(config).begin("CA1", "abc.1", Counter()) is None
    await EventLogs(config).run()


@pytest.mark.parametrize("call_id", ["../../etc/passwd", "CA 1/2", ".", "x" * 500])
async def test_a_call_s_id_cannot_choose_another_place(tmp_path: Path, call_id: str) -> None:
    logs = EventLogs(EventsConfig(directory=tmp_path / "events"))
    begin(logs, call_id).told(Dtmf("5"), 7)
    await write(logs)
    assert os.listdir(tmp_path) == ["events"]
    assert len(find(tmp_path / "events", call_id)) == 1


async def test_what_cannot_be_written_is_lost_counted_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_logs, "log", structlog.get_logger())
    (tmp_path / "events").write_text("in the way")
    logs = EventLogs(EventsConfig(directory=tmp_path / "events", transcripts=True))
    one, before = begin(logs), lost()
    with capture_logs() as said:
        for _ in range(2):
            one.told(Dtmf("5"), 7)
            await write(logs)
        assert lost() - before == 2
        (tmp_path / "events").unlink()
        one.told(Dtmf("6"), 7)
        await write(logs)
    assert [line["event"] for line in said] == ["event logs cannot be written", "event logs are written again"]
    header, [entry] = read(one.file)
    assert (header.call, entry.fields) == ("CA1", {"digit": "6"})


async def test_a_log_that_another_program_put_a_link_in_place_of_is_not_written(tmp_path: Path) -> None:
    logs = EventLogs(EventsConfig(directory=tmp_path))
    one = begin(logs)
    one.file.symlink_to(tmp_path / "elsewhere")
    await write(logs)
    assert not (tmp_path / "elsewhere").exists()


def test_the_old_are_removed_and_the_oldest_of_too_many() -> None:
    files = [(day * DAY_S, Path(str(day))) for day in range(10)]
    assert set(expired(files, 9 * DAY_S, keep_s=5 * DAY_S, keep_calls=100)) == {Path(str(day)) for day in range(4)}
    assert set(expired(files, 9 * DAY_S, keep_s=100 * DAY_S, keep_calls=3)) == {Path(str(day)) for day in range(7)}


def test_nothing_but_event_logs_is_ever_removed(tmp_path: Path) -> None:
    ours, others = tmp_path / "20200101T000000.000Z-CA1.jsonl", tmp_path / "diary.jsonl"
    for file in (ours, others):
        file.touch()
        os.utime(file, (0, 0))
    EventLogs(EventsConfig(directory=tmp_path)).remove_old()
    assert os.listdir(tmp_path) == ["diary.jsonl"]
