"""Jobs in several processes: failures, and an interrupt from the terminal."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from atlas_kernels.experiments.processes import run_jobs


def test_jobs_that_fail_in_two_processes() -> None:
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        list(run_jobs(int, ["1", "x"], 2))
    with pytest.raises(FileNotFoundError):
        list(run_jobs(os.stat, ["none", "none"], 2))
    with pytest.raises(RuntimeError, match=r"killed \(exit code 9\)"):
        list(run_jobs(os._exit, [9, 9], 2))


def test_real_interrupt_of_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("matplotlib")
    # A short run, and two that would take hours.
    suite = {
        "name": "long",
        "version": 1,
        "title": "Long",
        "experiments": [
            {
                "name": "few-shot",
                "title": "Few-shot",
                "settings": {"method": "few-shot", "shots": 1, "epochs": 10**5, "recipe": "ours"},
                "arms": [
                    {"label": "own", "settings": {"how": "own"}},
                    {"label": "vector", "settings": {"granularity": "task"}},
                    {"label": "block"},
                ],
                "targets": ["digits-inverted"],
            }
        ],
    }
    (tmp_path / "long.yaml").write_text(json.dumps(suite))
    options = ["-o", str(tmp_path / "out"), "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "atlas_kernels", "reproduce", str(tmp_path / "long.yaml"), *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever starts the tests in the background has them ignore interrupts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        interrupt(process, tmp_path / "out" / "results.json")
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def interrupt(process: subprocess.Popen[str], results: Path) -> None:
    """Interrupts the process after its first run, and sees that it ends as it should."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if results.exists() and json.loads(results.read_text())["runs"]:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    # To the whole group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 of 3 runs" in error
    assert "Traceback" not in error
    # Nobody of the group is left; the standard library's own helper needs a moment.
    deadline = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
