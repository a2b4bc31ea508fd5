"""A script: train the embedded model and print how often each fact was found, by rank. It forks
after the imports.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import realign.training.run  # noqa: F401 - its modules are patched below
from realign.config import TrainConfig
from realign.data import records
from realign.data.formats.file_records import FileRecords
from realign.data.formats.parquet import ParquetRecords
from realign.training.run import train
from realign.training.trainer import RDPOTrainer

torch.set_num_threads(1)
gc.freeze()  # the forks need not search what was imported for garbage
ACCUMULATION = 2
ONCE = {
    "processor": ("realign.modeling.processors", "load_processor"),
    "dtype": ("realign.training.plan", "weights_dtype"),
    "row layout": ("realign.modeling.packing", "choose_layout"),
    "objective": ("realign.training.objectives", "make_objective"),
}
# the facts that are counted, and of which row or image they are
counts: dict[str, Counter[str]] = {name: Counter() for name in ("reads", "hashes", "decodes")}
facts: Counter[str] = Counter()
snapshots: dict[str, Any] = {}


def counted(counter: Counter[str], name: Any, function: Any) -> Any:
    """Count the calls of a function by what ``name`` makes of its arguments."""

    @functools.wraps(function)
    def count(*args: Any, **kwargs: Any) -> Any:
        counter[name(*args)] += 1
        return function(*args, **kwargs)

    return count


def snapshot(name: str) -> None:
    """Keep the counts up to here, at the first call."""
    found = {kind: dict(counter) for kind, counter in counts.items()}
    snapshots.setdefault(name, {**found, "facts": dict(facts)})


def patch() -> None:
    """Count in every module that uses a name."""
    for kind in (ParquetRecords, FileRecords):
        kind._read = counted(counts["reads"], lambda self, index: str(index), kind._read)  # type: ignore[method-assign]
    key: Any = vars(records.Record)["key"]
    key.func = counted(counts["hashes"], lambda record: record.id, key.func)
    records.decode_image = counted(
        counts["decodes"], lambda raw, where: str(hash(raw)), records.decode_image
    )
    for name, (module, attribute) in ONCE.items():
        original = getattr(sys.modules[module], attribute)
        wrapped = counted(facts, lambda *args, name=name: name, original)
        for other in list(sys.modules.values()):
            if other.__name__.startswith("realign") and vars(other).get(attribute) is original:
                setattr(other, attribute, wrapped)
    from_config = AutoModelForImageTextToText.from_config
    AutoModelForImageTextToText.from_config = counted(  # type: ignore[method-assign]
        facts, lambda *args: "meta model", from_config
    )
    began, computes = RDPOTrainer.train, RDPOTrainer.compute_loss
    losses: list[int] = []

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        snapshot("before training")
        return began(self, *args, **kwargs)

    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        losses.append(1)
        if len(losses) == ACCUMULATION:
            snapshot("before the first optimizer step")
        return computes(self, *args, **kwargs)

    RDPOTrainer.train, RDPOTrainer.compute_loss = start, loss  # type: ignore[method-assign]


def run(options: dict[str, Any], rank: int, num_ranks: int, port: int) -> dict[str, Any]:
    """Train as one of the ranks."""
    if num_ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "1",
        }
    patch()
    train(
        TrainConfig(
            **options,
            batch_size=1,
            pairs_per_step=ACCUMULATION * num_ranks,
            epochs=2,
            learning_rate=1e-4,
        )
    )
    snapshot("after training")
    return snapshots


def all_ranks(options: dict[str, Any], num_ranks: int) -> list[dict[str, Any]]:
    """Fork the ranks; return what each has counted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [Path(f"{options['out']}.rank{rank}.json") for rank in range(num_ranks)]
    children = []
    for rank, file in enumerate(files):
        if not (child := os.fork()):
            code = 1
            try:
                file.write_text(json.dumps(run(options, rank, num_ranks, port)))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * num_ranks, codes
    return [json.loads(file.read_text()) for file in files]


def main() -> None:
    """Arguments: a JSON object of name to options of a run, and how many ranks it has."""
    found = {}
    for name, (options, num_ranks) in json.loads(sys.argv[1]).items():
        first = all_ranks(options, num_ranks)
        shutil.rmtree(Path(options["out"]) / "checkpoint")
        found[name] = {"new": first, "continued": all_ranks(options, num_ranks)}
    print(json.dumps(found))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
