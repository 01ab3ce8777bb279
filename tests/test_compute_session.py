"""A session of Ray: what it keeps off the terminal, and what gets through."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = r"""
import os, sys
from raylarge.compute.session import _native_stderr
with _native_stderr(sys.argv[1]):
    for level in "DIWEC":
        line = f"[2026-12-01 00:14:13,336 {level} 30 30] core_worker.cc:2465: level {level}\n"
        os.write(2, line.encode())
    os.write(2, b"a warning of another library\n")
    print("a line of ours", file=sys.stderr)
os.write(2, b"after it\n")
"""


def said(logs):
    done = subprocess.run(
        [sys.executable, "-c", CODE, logs], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_lines_of_rays_log_stay_off_the_terminal():
    lines = said("")
    fatal = "[2026-12-01 00:14:13,336 C 30 30] core_worker.cc:2465: level C"
    assert sorted(lines[:-1]) == [fatal, "a line of ours", "a warning of another library"]
    assert lines[-1] == "after it"


def test_with_a_folder_of_logs_everything_native_is_there(tmp_path):
    assert said(str(tmp_path)) == ["a line of ours", "after it"]
    log = (tmp_path / "native.log").read_text()
    assert "level E" in log
    assert "another library" in log
