"""`examples/worker_bridge`: a change of the agent's code while a caller is on the line, as its README shows it."""

import os
import subprocess
from pathlib import Path

from tests.examples.desk import EXAMPLES, configured


def test_a_running_call_keeps_its_code_the_next_gets_the_new_and_broken_code_is_refused(server: str, tmp_path: Path) -> None:
    config = configured("worker_bridge", tmp_path, server)
    environ = os.environ | {"DIALOG_CONFIG": str(config), "DIALOG_LOCAL_URL": f"http://{server}", "TMPDIR": str(tmp_path)}
    script = EXAMPLES / "worker_bridge" / "hot_change"
    shown = subprocess.run([str(script)], capture_output=True, text=True, timeout=60, check=False, env=environ)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "the first caller was greeted:  Bella's, good evening. How can I help?" in shown.stdout
    assert "the second caller was greeted: Bella's, good morning. How can I help?" in shown.stdout
    assert "AttributeError: 'VoIPProxy' object has no attribute 'no_such_method'" in shown.stderr
