"""A stage of the story that only writes its name; worker processes import it without torch."""

import os
import time


def note(cfg, seed, name, action=""):
    with open(cfg.out / "order.txt", "a") as order:
        order.write(f"{name} {os.getpid()}\n")
    if action == "fail":
        raise ValueError("no luck")
    if action == "die":
        os._exit(9)
    if action == "wait":
        time.sleep(60)
    (cfg.out / name).write_text("done")
    return f"{name} was played"
