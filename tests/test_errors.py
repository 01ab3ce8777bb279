import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from raylarge import report
from raylarge.errors import LONGEST, SlideError, UserError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\x1b[31m\r", r"a\nb\x1b[31m\r"),
        ("gpj.\u202efit", r"gpj.\u202efit"),
        (os.fsdecode(b"M\xfcller"), r"M\udcfcller"),
        ("zero\u200bwidth\u2028line\x85", r"zero\u200bwidth\u2028line\x85"),
        (
            "Müller µm × — 漢字 \u0645\u06cc\u200c\u062e",
            "Müller µm × — 漢字 \u0645\u06cc\u200c\u062e",
        ),
    ],
)
def test_a_message_shows_any_name_safely(text, shown):
    assert printable(text) == shown == str(UserError(text)) == str(SlideError(text))
    assert str(UserError(shown)) == shown
    assert str(pickle.loads(pickle.dumps(UserError(text)))) == shown
    shown.encode()


def test_a_very_long_name_loses_its_middle():
    text = "start " + "x" * 100_000 + " end"
    shown = str(UserError(text))
    assert len(shown) < LONGEST + 100
    assert shown.startswith("start x")
    assert shown.endswith("x end")
    assert "[... 96,010 characters ...]" in shown


def test_tables_and_lines_of_the_terminal_are_safe_too(capsys):
    report.say("two\nlines\x1b[2J \u202e")
    report.say(report.table(["file"], [["a\nb"], [os.fsdecode(b"\xff")]]))
    assert capsys.readouterr().out == ("two\nlines\\x1b[2J \\u202e\nfile\n------\na\\nb\n\\udcff\n")


JOB = """
import os
from raylarge import report
from raylarge.errors import UserError
def job(words):
    report.say("0.5 µm/px \\u2014 " + os.fsdecode(b"\\xff"))
    raise UserError("no slide fits " + words[0] + " (µm)")
report.entry(job)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_of_a_terminal_is_an_error(tmp_path, encoding):
    (tmp_path / "job.py").write_text(JOB)
    root = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), b"M\xfcller\n.tif"],
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding, **root},
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"0.5 " in done.stdout
    assert b"\\udcff" in done.stdout
    assert rb"M\udcfcller\n.tif" in done.stderr
