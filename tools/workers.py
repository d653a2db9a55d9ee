"""A list of tasks on a few worker processes: each starts when the tasks it needs are done.

A task names a function, which workers import: the process that hands tasks out loads no torch and
says from the first second what is being done, how many tasks are done and how long the rest takes.
A task whose last file exists is not done again, so a run that was stopped goes on where it was.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from runtime import Failure, InputError, clock


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
    waiting = [task for task in tasks if not task.made.exists()]
    done = {task.name for task in tasks if task not in waiting}
    if done:
        print(f"{len(done)} of {len(tasks)} tasks were done before")
    progress, others = Progress(waiting, jobs), multiprocessing.active_children()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores
    spawn, running = multiprocessing.get_context("spawn"), {}
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=start_worker)
    for _ in range(jobs):  # starts every worker: at a submission the pool watches those there
        pool.submit(load_modules, {task.function.partition(":")[0] for task in waiting})
    try:
        while waiting or running:
            ready = [task for task in waiting if set(task.needs) <= done]
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(perform, task)] = task
                progress.tell(task, "started")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running[future]
                if error := future.exception():
                    raise_for(task, error, ", ".join(task.name for task in running.values()))
                del running[future]
                done.add(task.name)
                progress.finish(task, future.result())
    finally:
        if running:  # after a failure: what the other workers do is continued next time
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """A worker ends with its parent, however that ends; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def load_modules(names: set[str]) -> None:
    for name in names:
        importlib.import_module(name)


def perform(task: Task) -> str:
    """One task in a worker, its output appended to log.txt."""
    module, _, name = task.function.partition(":")
    task.made.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(task.made.parent / "log.txt", "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        print(f"{time.strftime('%F %T')} {task.name}: {name}{task.arguments}")
        return getattr(importlib.import_module(module), name)(*task.arguments)


def raise_for(task: Task, error: BaseException, under_way: str) -> None:
    """One line about a task that failed; the traceback goes to its log."""
    log = task.made.parent / "log.txt"
    if isinstance(error, (InputError, Failure)):
        raise type(error)(f"{task.name}: {error}") from None
    if isinstance(error, BrokenProcessPool):
        raise Failure(f"a process was killed (memory?) during {under_way}; start this again")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.writelines(traceback.format_exception(error))
    raise Failure(f"{task.name}: {type(error).__name__}: {error} (see {log})")


class Progress:
    """A line when a task starts or ends: time so far, tasks done, time left, what."""

    def __init__(self, tasks: list[Task], jobs: int) -> None:
        self.began, self.jobs, self.done, self.count = time.time(), jobs, 0, len(tasks)
        self.expected, self.left = 0.0, sum(task.seconds for task in tasks)

    def tell(self, task: Task, words: str) -> None:
        spent = time.time() - self.began
        pace = (spent * self.jobs + 20) / (self.expected + 20)  # 1 where tasks take their seconds
        left = clock(self.left * pace / self.jobs)
        line = (
            f"{clock(spent)}  {self.done} of {self.count} done, {left} left  {task.name}: {words}"
        )
        print(line, flush=True)

    def finish(self, task: Task, words: str) -> None:
        self.done, self.expected = self.done + 1, self.expected + task.seconds
        self.left -= task.seconds
        self.tell(task, words)
