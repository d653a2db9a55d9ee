"""A list of tasks on a few worker processes: each starts when the tasks it needs are done.

A task names a function, which workers import: the process that hands tasks out loads no torch and
says from the first second what is being done, how many tasks are done and how long the rest takes.
A task whose last file exists is not done again, so a run that was stopped goes on where it was.
"""

import multiprocessing
import os
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pkgutil import resolve_name

from runtime import Failure, start_worker


@dataclass(frozen=True)
class Task:
    """A call of `function` ("module:name"), which returns some words about what came out."""

    name: str
    function: str
    arguments: tuple
    made: Path  # the last file that it writes; its folder gets the output, log.txt
    needs: tuple[str, ...] = ()  # names of other tasks
    seconds: float = 1.0  # on an idle core, roughly


def run_tasks(tasks: list[Task], jobs: int) -> None:
    """Do every task that is not done yet, `jobs` at a time; the first failure ends all of them."""
    began, todo = time.time(), [task for task in tasks if not task.made.exists()]
    waiting, done = list(todo), {task.name for task in tasks if task not in todo}
    if done:
        print(f"{len(done)} of {len(tasks)} tasks were done before")

    def tell(task: Task, words: str) -> None:
        """Time so far, tasks done, time left at the pace so far, what."""
        spent, finished = time.time() - began, [task for task in todo if task.name in done]
        expected = sum(task.seconds for task in finished)
        pace = (spent * jobs + 20) / (expected + 20)  # 1 where tasks take their seconds
        left = (sum(task.seconds for task in todo) - expected) * pace / jobs
        progress = f"{len(finished)} of {len(todo)} done, {timedelta(seconds=int(left))} left"
        print(f"{timedelta(seconds=int(spent))}  {progress}  {task.name}: {words}", flush=True)

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores
    running: dict[Future, Task] = {}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    for _ in range(jobs):  # starts every worker: at a submission the pool watches those there
        pool.submit(time.sleep, 0)
    try:
        while waiting or running:
            ready = [task for task in waiting if set(task.needs) <= done]
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(perform, task)] = task
                tell(task, "started")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                words, task = future.result(), running.pop(future)
                done.add(task.name)
                tell(task, words)
    except BrokenExecutor:
        during = ", ".join(task.name for task in running.values())
        raise Failure(f"a process was killed (memory?) during {during}; start this again") from None
    finally:
        if running:  # after a failure: what the other workers do is continued next time
            for worker in multiprocessing.active_children():
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def perform(task: Task) -> str:
    """One task in a worker; its output is appended to log.txt, with the traceback of a failure."""
    path = task.made.parent / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        print(f"{time.strftime('%F %T')} {task.name}: {task.function}{task.arguments}")
        try:
            return resolve_name(task.function)(*task.arguments)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise Failure(f"{task.name}: {type(error).__name__}: {error} (see {path})") from error
