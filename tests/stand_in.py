"""A task that only writes its name; worker processes import it without torch."""

import os
import time


def note(folder, name, action=""):
    with open(folder / "order.txt", "a") as order:
        order.write(f"{name} {os.getpid()}\n")
    if action == "fail":
        raise ValueError("no luck")
    if action == "die":
        os._exit(9)
    if action == "wait":
        time.sleep(60)
    (folder / name).write_text("done")
    return f"{name} was played"
