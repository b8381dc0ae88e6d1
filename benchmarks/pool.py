"""Run many small jobs, each in a forked process with a limit on time and memory, and survive what they do.

A fork costs nothing where the parent has imported all that the jobs need, and every job starts from the same state. The
parent must not have started threads that hold locks (torch's autograd starts its own at the first backward pass).
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1
PATIENCE = 30
Report = dict[str, Any]
Job = Callable[[Callable[[Report], None]], None]


@dataclass
class _Running:
    key: Any
    process: multiprocessing.process.BaseProcess
    reports: Connection
    started: float
    log: Path
    found: Report = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        key: the job's.
        found: everything it reported, later reports over earlier ones.
        problem: ``""`` if it came to its end, else why not: an exception, a limit, a signal.
        detail: the traceback or the end of what the process printed.
        seconds: wall clock.
    """

    key: Any
    found: Report
    problem: str
    detail: str
    seconds: float


def run(
    jobs: Iterable[tuple[Any, Job]], *, workers: int, seconds: float, gigabytes: float,
    tick: Callable[[list[Any]], None],
) -> Iterator[Outcome]:  # fmt: skip
    """Outcomes in the order in which jobs end.

    Args:
        jobs: key and function; the function gets one to report with, any number of times.
        workers: how many at once.
        seconds: limit for one job, of processor time (other jobs do not count); of wall clock, ``PATIENCE`` times that.
        gigabytes: limit on the resident memory of one job.
        tick: called about ten times a second with the keys that are running.
    """
    context = multiprocessing.get_context("fork")
    waiting = iter(jobs)
    running: list[_Running] = []
    try:
        while True:
            while len(running) < workers and (following := next(waiting, None)) is not None:
                running.append(_start(context, *following))
            if not running:
                return
            multiprocessing.connection.wait([each.reports for each in running], timeout=POLL_SECONDS)
            tick([each.key for each in running])
            for each in list(running):
                outcome = _look(each, seconds, gigabytes)
                if outcome is not None:
                    running.remove(each)
                    yield outcome
    finally:
        for each in running:
            each.process.kill()
            each.log.unlink(missing_ok=True)


def alone(job: Job, *, seconds: float = math.inf, gigabytes: float = math.inf) -> Report:
    """What one job reports.

    Raises:
        RuntimeError: why it did not come to its end.
    """
    (outcome,) = run([(None, job)], workers=1, seconds=seconds, gigabytes=gigabytes, tick=lambda _: None)
    if outcome.problem:
        raise RuntimeError(f"{outcome.problem}\n{outcome.detail}")
    return outcome.found


def _start(context: Any, key: Any, job: Job) -> _Running:
    reports, sender = context.Pipe(duplex=False)
    handle, log = tempfile.mkstemp(prefix="coverage-")
    os.close(handle)
    process = context.Process(target=_child, args=(job, sender, log), daemon=True)
    process.start()
    sender.close()
    return _Running(key, process, reports, time.monotonic(), Path(log))


def _child(job: Job, sender: Connection, log: str) -> None:
    target = os.open(log, os.O_WRONLY)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = sys.stderr = open(target, "w", buffering=1)  # noqa: SIM115 (it lives as long as the process)
    try:
        job(sender.send)
    except BaseException as problem:  # the parent records it
        sender.send({"problem": f"{type(problem).__name__}: {problem}", "detail": traceback.format_exc()})
    sender.send(None)
    sender.close()
    os._exit(0)  # no clean-up of what the parent owns


def _look(each: _Running, seconds: float, gigabytes: float) -> Outcome | None:
    """The outcome, once there is one."""
    alive = each.process.is_alive()  # asked first: what a dead process sent is all there
    stopped = ""
    try:
        while each.reports.poll():
            report = each.reports.recv()
            if report is None:
                each.finished = True
            else:
                each.found.update(report)
    except (EOFError, OSError):
        alive = alive and not each.finished
    elapsed = time.monotonic() - each.started
    if alive and not each.finished:
        resident = _resident(each.process.pid)
        if _processor(each.process.pid) > seconds:
            stopped = f"timeout after {seconds:g} s of processor time"
        elif elapsed > PATIENCE * seconds:
            stopped = f"timeout after {elapsed:.0f} s"
        elif resident > gigabytes:
            stopped = f"out of memory: more than {gigabytes:g} GiB"
        else:
            return None
        each.process.kill()
    each.process.join()
    each.reports.close()
    found = dict(each.found)
    problem = found.pop("problem", "") or stopped
    detail = found.pop("detail", "")
    if not problem and not each.finished:
        problem = f"the process died with exit code {each.process.exitcode}"
    if problem and not detail:
        detail = each.log.read_text(errors="replace")[-3000:]
    each.log.unlink(missing_ok=True)
    return Outcome(each.key, found, problem, detail, elapsed)


def _resident(pid: int | None) -> float:
    """GiB; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _processor(pid: int | None) -> float:
    """Seconds of processor time, user and system; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
