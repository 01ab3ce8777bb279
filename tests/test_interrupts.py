"""SIGTERM and SIGHUP end a job like Ctrl-C: one sentence, 128 + the signal, nothing lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylarge import interrupts

ROOT = Path(__file__).parents[1]
JOB = """
import sys, time
from raylarge import report
def job(words):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("left in order", flush=True)
        {cleanup}
report.entry(job)
"""


@pytest.fixture(autouse=True)
def usual_handlers():
    """In this process, too, signals mean what they mean in a terminal."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def by_default():
    """Whatever started the tests (nohup, a shell's background) may have signals ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def started(code, **more):
    more.setdefault("preexec_fn", by_default)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("cleanup", ["pass", "raise RuntimeError('in a clean-up')", "1 / 0"])
def test_a_job_ends_with_one_sentence_and_the_signals_status(name, cleanup):
    process = started(JOB.format(cleanup=cleanup))
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert output == "left in order\n"
    assert errors == f"stopped by {name}; run the same command again to go on\n"


def test_ctrl_c_stays_as_it_was():
    process = started(JOB.format(cleanup="pass"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; run the same command again to go on\n"


def test_further_signals_do_not_cut_the_clean_up():
    process = started(JOB.format(cleanup="time.sleep(1); print('cleaned up', flush=True)"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "left in order\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert output == "cleaned up\n"
    assert errors.count("\n") == 1


def test_nohup_keeps_its_meaning():
    code = JOB.replace("time.sleep(60)", "time.sleep(2)").format(cleanup="pass")
    process = started(code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_terminal_that_has_gone_is_no_traceback():
    process = started(JOB.format(cleanup="pass"))
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129


def test_a_closed_stream_does_not_change_the_status():
    process = started(JOB.format(cleanup="sys.stderr.close()"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_what_must_not_be_cut(number):
    steps = []

    def work():
        with interrupts.postponed():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            steps.append("whole")
            signal.signal(signal.SIGTERM, lambda *_: steps.append("another handler"))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            steps.append("still whole")
        steps.append("not reached")

    with interrupts.handled() as received, pytest.raises(interrupts.Interrupted):
        work()
    assert steps == ["whole", "still whole"]
    assert len(received) == 1  # of the two that came, one ends the job
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_second_ctrl_c_does_not_wait():
    def work():
        with interrupts.postponed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_programs_without_handlers_keep_those_that_ray_installs():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with interrupts.postponed():
            signal.signal(signal.SIGTERM, print)
        assert signal.getsignal(signal.SIGTERM) == print
    finally:
        signal.signal(signal.SIGTERM, before)
