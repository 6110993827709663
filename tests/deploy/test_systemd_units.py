"""The units agree with the code that they run and the page that explains them; `deploy/systemd/verify` checks the rest."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dialog_supervisor.sections import CallsConfig, GatewayConfig
from dialog_supervisor.systemd import LISTENER_NAME
from dialog_supervisor.template_process import START_TIMEOUT_S
from tests.e2e.daemon import ACCOUNT_SID, DIALOGCTL, PROBE, Dialogd, write_agent

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
SECONDS = {"s": 1, "": 1, "min": 60}

CONFIG = f"""
[gateway]
listen = "127.0.0.1:0"
public_url = "https://voice.example.com"
[twilio]
account_sid = "{ACCOUNT_SID}"
auth_token = "credential:twilio_auth_token"
[agent]
path = "agent"
"""


def directives(name: str) -> Iterator[tuple[str, str]]:
    for line in (UNITS / name).read_text().splitlines():
        if line[:1].isalpha():
            key, _, value = line.partition("=")
            yield key, value


def seconds(key: str) -> int:
    match = re.fullmatch(r"(\d+)(s|min)?", dict(directives("dialogd.service"))[key])
    assert match is not None
    return int(match[1]) * SECONDS[match[2] or ""]


def test_a_stop_has_time_for_the_whole_drain() -> None:
    calls = CallsConfig()
    assert seconds("TimeoutStopSec") > calls.drain_timeout + 2 * calls.ending_timeout + calls.shutdown_grace


def test_a_start_has_time_for_the_agents_imports() -> None:
    assert seconds("TimeoutStartSec") > START_TIMEOUT_S


def test_the_socket_unit_takes_the_place_of_the_default_address_by_the_name_that_dialogd_knows() -> None:
    socket_unit = dict(directives("dialogd.socket"))
    assert socket_unit["ListenStream"] == GatewayConfig(public_url="https://voice.example.com").listen
    assert socket_unit["FileDescriptorName"] == LISTENER_NAME


def test_the_installed_dialogctl_uses_the_units_paths() -> None:
    unit = dict(directives("dialogd.service"))
    wrapper = (UNITS / "dialogctl").read_text()
    dialogd, _, config = unit["ExecStart"].split()
    assert f"DIALOG_CONFIG={config}\n" in wrapper
    assert f"RUNTIME_DIRECTORY=/run/{unit['RuntimeDirectory'].replace('%i', '$node')}\n" in wrapper
    assert "CREDENTIALS_DIRECTORY=/run/credentials/dialogd${node:+@$node}.service " in wrapper
    assert f"exec {Path(dialogd).with_name('dialogctl')} " in wrapper


@pytest.mark.parametrize("name", ["dialogd.service", "dialogd.socket", "newer-systemd.conf"])
def test_every_directive_is_explained(name: str) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert [key for key, _ in directives(name) if f"`{key}=" not in page] == []


def test_several_dialogds_are_walled_in_as_one_is() -> None:
    assert (UNITS / "dialogd@.service").samefile(UNITS / "dialogd.service")


@pytest.mark.parametrize(("node", "unit"), [("", "dialogd"), ("2", "dialogd@2")])
def test_the_installed_dialogctl_finds_a_dialogd_that_has_its_token_as_a_credential(
    tmp_path: Path, node: str, unit: str
) -> None:
    run, credentials = tmp_path / f"run/dialog{node}", tmp_path / f"run/credentials/{unit}.service"
    for directory in (run, credentials):
        directory.mkdir(mode=0o700, parents=True)
    (credentials / "twilio_auth_token").write_text("the-carriers-secret\n")
    write_agent(tmp_path / "agent", PROBE)
    (tmp_path / "dialog.toml").write_text(CONFIG)
    wrapper = tmp_path / "dialogctl"
    installed = {
        "=/run/": f"={tmp_path}/run/",
        "/etc/dialog": str(tmp_path),
        "/opt/dialog/venv/bin/dialogctl": str(DIALOGCTL),
    }
    text = (UNITS / "dialogctl").read_text()
    for place, here in installed.items():
        assert place in text
        text = text.replace(place, here)
    wrapper.write_text(text)
    wrapper.chmod(0o755)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials), "RUNTIME_DIRECTORY": str(run), "DIALOG_NODE": node}
    with Dialogd(tmp_path / "dialog.toml", environ) as dialogd:
        dialogd.wait_for_log(event="ready")
        done = subprocess.run(
            [wrapper, *([f"@{node}"] if node else []), "status"],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "taking calls" in done.stdout
        dialogd.stop()
