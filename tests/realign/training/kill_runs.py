"""A script: train the embedded model again and again, end it at random moments, resume it with the
same call, and compare every end with a run that nobody stopped.

It forks after the imports, which take longer than a run. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import realign.training.run  # noqa: F401  (before the forks, not in each)
from realign.cli import app
from realign.config import TrainConfig
from realign.training.checkpoints import SAVING, checkpoints, newest_checkpoint
from realign.training.trainer import RDPOTrainer

torch.set_num_threads(1)
gc.freeze()  # the forks need not search what was imported for garbage
Tree = dict[str, bytes]


def life(config: TrainConfig, before: Callable[[], None] | None = None) -> int:
    """Fork; train in the child and keep its last checkpoint. Returns the child's number."""
    if child := os.fork():
        return child
    try:
        code = 1
        warnings.simplefilter("error")
        with open(config.out.parent / "said.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if before:
            before()
        trained = RDPOTrainer.train

        def train_and_keep(self: RDPOTrainer, *args: Any, **kwargs: Any) -> Any:
            result = trained(self, *args, **kwargs)
            last = checkpoints(config.out / "steps")[-1]
            assert last.name == f"checkpoint-{self.state.max_steps}"
            shutil.rmtree(config.out / "last", ignore_errors=True)
            shutil.copytree(last, config.out / "last")
            return result

        RDPOTrainer.train = train_and_keep
        options = config.out.parent / f"{config.out.name}.json"  # JSON is YAML
        options.write_text(json.dumps({"train": config.model_dump(mode="json")}))
        app(["train", "--config", str(options)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def after(events: int, folder: Path) -> Callable[[], None]:
    """Kill the process at that many changes of the checkpoints' files."""

    def install() -> None:
        left = [events]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                path = arguments[0]
                if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


def wait(child: int) -> int:
    """Return the exit code of the process, which is negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> Tree:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "cache" not in path.relative_to(folder).parts
    }


def main() -> None:
    """Arguments: a JSON object with model, data, folder, seed, count, signal and options."""
    given = json.loads(sys.argv[1])
    folder, rng = Path(given["folder"]), random.Random(given["seed"])
    by = getattr(signal, given["signal"])
    options = {"model": given["model"], "data": given["data"], **given["options"]}
    whole = TrainConfig(out=folder / "whole", **options)
    started = time.monotonic()
    assert wait(life(whole)) == 0, (folder / "said.txt").read_text()
    seconds = time.monotonic() - started  # with the cache, which the others are given
    options["cache"] = whole.out / "cache"
    expected = tree(whole.out)
    result: dict[str, Any] = {
        "stopped": 0,
        "runs": 0,
        "equal": 0,
        "while saving": 0,
        "slowest exit": 0.0,
        "seconds of a run": round(seconds, 2),
        "differ": [],
    }
    while result["stopped"] < given["count"]:
        config = TrainConfig(out=folder / f"run{result['runs']}", **options)
        code = None
        while code != 0:
            at_event = by == signal.SIGKILL and rng.random() < 0.5
            # enough for one or two saves; the first events come from reading an older checkpoint
            before = after(rng.randrange(200), config.out / "steps") if at_event else None
            child = life(config, before)
            if not at_event:
                time.sleep(rng.uniform(0.0, seconds))
                sent = time.monotonic()
                os.kill(child, by)
            code = wait(child)
            if by == signal.SIGTERM:
                result["slowest exit"] = max(result["slowest exit"], time.monotonic() - sent)
            if code == 0:
                break
            assert code in (-signal.SIGKILL, 143), (folder / "said.txt").read_text()
            result["stopped"] += 1
            steps = config.out / "steps"
            result["while saving"] += (steps / SAVING).exists()
            if by == signal.SIGTERM:
                left = checkpoints(steps)
                assert not left or newest_checkpoint(steps) == left[-1]
        result["runs"] += 1
        found = tree(config.out)
        if found == expected:
            result["equal"] += 1
            shutil.rmtree(config.out)
        else:
            names = found.keys() | expected.keys()
            result["differ"] += [n for n in sorted(names) if found.get(n) != expected.get(n)]
    print(json.dumps(result))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
