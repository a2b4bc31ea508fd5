"""The command ``realign eval``: ask models the same questions once, store and compare answers.

<data>/                             the files of any benchmarks (docs/guides/evaluation.md)
<out>/answers/NAME.jsonl            one line per item (see realign.evaluation.stored_answers)
<out>/answers/NAME.header.json      everything that the answers depend on
<out>/journal/NAME/                 answers so far, while a model is asked
<out>/unpacked/                     images that lie in the benchmarks' files
<out>/scores.json                   scores and comparisons
<out>/samples/                      images of the sample answers in scores.json
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from realign.config import EvalConfig
from realign.errors import RefusedError
from realign.evaluation.answer_identity import AskedModel, data_identity
from realign.evaluation.asking import ask
from realign.evaluation.comparison import score
from realign.evaluation.items import check_items, choose_prompts, make_items
from realign.evaluation.pictures import read_pictures, unpack_pictures
from realign.evaluation.registry import find_data, read_tasks
from realign.evaluation.stored_answers import (
    Item,
    make_batches,
    read_stored_answers,
    write_answers,
)
from realign.generation.generator import Answer
from realign.modeling.adapter_folder import check_adapter
from realign.modeling.folder import resolve_model
from realign.modeling.identity import machine_numerics
from realign.modeling.loading import choose_dtype
from realign.runtime.files import write_json
from realign.runtime.progress import announce
from realign.runtime.ranks import Ranks
from realign.runtime.run_folder import check_out, claim, only_run

SCHEMA = 2  # of the folder's claim and of headers


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Answer, score and compare; return the content of ``scores.json``.

    Under ``torchrun`` or ``accelerate launch`` the processes share the questions.

    Raises:
        RefusedError: A file or image is missing, a row lacks a key, a model cannot read a question,
            an adapter has no effect, or the output folder holds another run.
    """
    ranks = Ranks()
    run = ranks.run_together(lambda: _Run(config) if ranks.is_first else None)
    asked: tuple[list[Item], dict[str, Path]] = ranks.run_on_first(lambda: _asked(run))
    items, folders = asked
    batches = make_batches(items, config.batch_size)
    with ExitStack() as lock:
        ranks.run_on_first(lambda: lock.enter_context(only_run(config.out, "eval")))
        ranks.run_on_first(lambda: run.begin() if run else None)
        ranks.check_folder_is_shared(config.out)
        for name, folder in folders.items():
            path = config.out / "answers" / f"{name}.jsonl"
            if not ranks.run_on_first(path.is_file):
                answers, effect = ask(name, folder, items[0].question, batches, config, ranks)
                if run:
                    run.store(path, name, answers, effect)
        return ranks.run_on_first(lambda: run.score() if run else {})


def _asked(run: _Run | None) -> tuple[list[Item], dict[str, Path]]:
    assert run is not None
    return run.items, {name: model.folder for name, model in run.models.items()}


class _Run:
    """The work of the first process: to check everything before a model is loaded, and to score.

    Raises:
        RefusedError: For the reasons of :func:`evaluate`.
    """

    def __init__(self, config: EvalConfig) -> None:
        check_out(config.out)
        self.config = config
        found = find_data(config.data, config.benchmarks)
        self.tasks = read_tasks(found)
        self.data = {benchmark.name: folder for benchmark, folder in found.items()}
        self.models = _find_models(config)
        self.prompts = choose_prompts(self.tasks, config.prompt)
        self.pictures = read_pictures(
            self.tasks, self.data, config.images or config.data, config.out / "unpacked"
        )
        self.items = make_items(self.tasks, self.prompts, self.pictures, config.max_new_tokens)
        sizes = {picture.path: picture.size for picture in self.pictures.values()}
        for name, model in self.models.items():
            check_items(name, model.processor, model.config, self.items, sizes)

    def begin(self) -> None:
        """Claim the output folder, and unpack the images that lie in the benchmarks' files.

        Raises:
            RefusedError: The folder holds another run.
        """
        config = self.config
        digests = {
            f"{name}/{image}": picture.sha256 for (name, image), picture in self.pictures.items()
        }
        claim(
            config.out,
            "eval",
            {
                "schema": SCHEMA,
                "models": {name: model.files for name, model in self.models.items()},
                "processors": {
                    name: model.processor_identity() for name, model in self.models.items()
                },
                "images": [digests[name] for name in sorted(digests)],
                "data": data_identity(self.tasks),
                **self._generation(),
            },
            {"images": sorted(digests)},
        )
        unpack_pictures(self.tasks, self.data, self.pictures)

    def store(
        self, path: Path, name: str, answers: Mapping[str, Answer], effect: float | None
    ) -> None:
        """Write the answers of a model and their header."""
        header = {
            "schema": SCHEMA,
            "name": name,
            **self.models[name].header(),
            **self._generation(),
            "data": data_identity(self.tasks),
        }
        if header["adapter"]:
            first = self.items[0]
            header["adapter"]["effect"] = {
                "largest_logit_difference": effect,
                "benchmark": first.benchmark,
                "id": first.id,
            }
        write_answers(path, header, self.items, answers)

    def _generation(self) -> dict[str, Any]:
        """Return the settings of generation, which all models share."""
        limits = {item.benchmark: item.question.max_new_tokens for item in self.items}
        return {
            "prompts": {name: program for name, (program, _) in self.prompts.items()},
            "max_new_tokens": limits,
            "decoding": {"do_sample": False, "num_beams": 1, "batch_size": self.config.batch_size},
            "dtype": str(choose_dtype(self.config.dtype)).removeprefix("torch."),
            "machine": machine_numerics(),
        }

    def score(self) -> dict[str, Any]:
        """Score the stored answers, write the scores and the images of the samples, and remove the
        journals.
        """
        config = self.config
        folder = config.out / "answers"
        wanted = {(item.benchmark, item.id) for item in self.items}
        answers = {
            name: read_stored_answers(folder / f"{name}.jsonl", wanted) for name in self.models
        }
        scores = score(self.tasks, answers, resamples=config.bootstrap, seed=config.seed)
        for name in dict.fromkeys(task.benchmark.name for task in self.tasks.values()):
            if name not in scores["benchmarks"]:
                announce(f"{name}: answers are stored; have them judged by `realign eval judge`")
        (config.out / "samples").mkdir(exist_ok=True)
        for number, sample in enumerate(scores["samples"]):
            path = self.pictures[sample["benchmark"], sample["image"]].path
            sample["picture"] = f"{number}{path.suffix}"
            shutil.copyfile(path, config.out / "samples" / sample["picture"])
        write_json(config.out / "scores.json", scores)
        shutil.rmtree(config.out / "journal", ignore_errors=True)
        return scores


def _find_models(config: EvalConfig) -> dict[str, AskedModel]:
    folders = {name: resolve_model(model) for name, model in config.models.items()}
    if not folders:
        raise RefusedError(
            "eval.models must name at least one model, got none. Pass --model NAME=FOLDER."
        )
    if bad := [name for name in folders if not re.fullmatch(r"[\w .+-]+", name)]:
        raise RefusedError(f"eval.models must have plain names, got {bad[0]!r}. Rename it.")
    for folder in folders.values():
        check_adapter(folder)
    return {name: AskedModel(folder) for name, folder in folders.items()}
