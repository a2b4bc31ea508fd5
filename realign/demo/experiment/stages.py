"""The experiment from pairs to results. Every stage writes its missing files, in several processes,
and the next stage reads them.

    <out>/experiment.json   everything that the results depend on
    <out>/images/           evaluation scenes
    <out>/pairs/            pairs, one file per kind and seed
    <out>/runs/             answers of every run
    <out>/seconds/          CPU seconds of pairs and runs
    <out>/results.json, tables.md, *.svg
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from realign.demo.experiment.protocol import (
    BASE,
    Condition,
    Protocol,
    View,
)
from realign.demo.experiment.run import DoRun, MakePairs, PairSet, Run
from realign.demo.experiment.scenes import Draw
from realign.demo.experiment.scores import ModelAnswers, object_f1, scores
from realign.demo.experiment.search import Setting, Trial, best_setting, next_trials
from realign.modeling.identity import machine_numerics
from realign.runtime.engine.engine import Engine, fill_shards
from realign.runtime.files import file_sha256
from realign.runtime.run_folder import check_out, claim
from realign.runtime.strict_json import read_json

# Rough estimates of CPU seconds, so that progress is measured by work instead of runs.
PAIRS_SECONDS, DRAW_SECONDS, CAPTIONS_SECONDS = 60, 7, 2
ROW_SECONDS = 0.1


class Experiment:
    """The stages of an experiment in one folder.

    Args:
        protocol: Protocol of the experiment.
        base: Folder of the model to align.
        out: Folder of the experiment; the same call continues where the last one stopped.
        workers: Number of processes, each with one thread; results do not depend on it.
    Raises:
        RefusedError: The folder holds another experiment.
    """

    def __init__(self, protocol: Protocol, base: Path, out: Path, workers: int) -> None:
        check_out(out)
        self.protocol, self.base, self.out = protocol, base, out
        self.engine = Engine(workers=workers, threads=1)
        self.identity = {
            "protocol": asdict(protocol),
            "base": file_sha256(base / "model.safetensors"),
            "numerics": machine_numerics(),
        }
        claim(out, "experiment", self.identity)
        self._searched: dict[str, list[Trial]] = {}
        # every file is read and scored once
        self._draws: dict[int, Draw] = {}
        self._answers: dict[tuple[Run, int], ModelAnswers] = {}
        self._scores: dict[tuple[Run, int], dict[str, float] | None] = {}

    def make_pairs(self, wanted: Iterable[PairSet]) -> None:
        """Make the missing sets of pairs."""
        sets = [*dict.fromkeys(wanted)]
        task = MakePairs(self.protocol, self.base, self.out)
        self._fill("pairs", sets, [PAIRS_SECONDS] * len(sets), task)

    def do_runs(self, stage: str, wanted: Iterable[Run]) -> None:
        """Execute the missing runs."""
        runs = [*dict.fromkeys(wanted)]
        task = DoRun(self.protocol, self.base, self.out)
        self._fill(stage, runs, [self._seconds(run) for run in runs], task)

    def _fill(
        self, stage: str, items: Sequence[PairSet | Run], sizes: list[int], task: Any
    ) -> None:
        paths = {number: item.file(self.out) for number, item in enumerate(items)}
        fill_shards(stage, paths, dict(enumerate(sizes)), items.__getitem__, task, self.engine)

    def _seconds(self, run: Run) -> int:
        """Estimate the CPU seconds of a run."""
        rows = 0 if run.condition == BASE else self._rows(run.condition, max(run.steps))
        draw = CAPTIONS_SECONDS if run.only_captions else DRAW_SECONDS
        return max(1, round(ROW_SECONDS * rows + draw * len(run.draws) * len(run.steps)))

    def _rows(self, condition: str, steps: int) -> int:
        return steps * self.protocol.condition(condition).rows_per_pair

    # Tuning

    def tune(self) -> None:
        """Search the best settings of all conditions that have a tuning of their own."""
        protocol = self.protocol
        conditions = [one for one in protocol.conditions if one.is_tuned]
        self.make_pairs(
            PairSet(one.pairs, seed) for one in conditions for seed in protocol.tuning_seeds
        )
        while trials := [
            (condition, trial)
            for condition in conditions
            for trial in next_trials(
                protocol.grid_of(condition),
                self.known(condition),
                len(self._searched.get(condition.name, [])),
                protocol.max_extensions,
            )
        ]:
            self.do_runs(
                "tuning",
                (
                    self.trial_run(condition, trial, seed)
                    for condition, trial in trials
                    for seed in protocol.tuning_seeds
                ),
            )
            for condition, trial in trials:
                self._searched.setdefault(condition.name, []).append(trial)

    def trial_run(self, condition: Condition, trial: Trial, seed: int) -> Run:
        """Return the run of a trial on one tuning seed."""
        return Run(
            condition.name,
            seed,
            trial.learning_rate,
            trial.beta,
            tuple(sorted({steps_for(rows, condition) for rows in trial.rows})),
            (self.protocol.tuning_draw,),
            only_captions=True,
        )

    def trial_scores(self, condition: Condition) -> dict[Setting, list[dict[str, float]]]:
        """Return every tried setting with its scores on each tuning seed; the scores are empty if
        the run stopped early.
        """
        found: dict[Setting, list[dict[str, float]]] = {}
        for trial in self._searched.get(condition.name, []):
            for seed in self.protocol.tuning_seeds:
                run = self.trial_run(condition, trial, seed)
                for rows in trial.rows:
                    setting = Setting(trial.learning_rate, trial.beta, rows)
                    one = self.scored(run, steps_for(rows, condition))
                    found.setdefault(setting, []).append(one or {})
        return found

    def known(self, condition: Condition) -> dict[Setting, float]:
        """Return the mean object F1 of every tried setting; a run that stopped counts as 0."""
        return {
            setting: math.fsum(object_f1(one) if one else 0.0 for one in of_seeds) / len(of_seeds)
            for setting, of_seeds in self.trial_scores(condition).items()
        }

    def chosen(self, name: str) -> Setting:
        """Return the best setting of a condition, or of the one that it takes its settings of."""
        condition = self.protocol.condition(name)
        return best_setting(self.known(self.protocol.condition(condition.settings_of or name)))

    # Reporting

    def report(self) -> None:
        """Do the runs that claims are about, the most worthwhile conditions first."""
        protocol = self.protocol
        self.do_runs("base", [self.base_run()])
        # starting the processes of a stage takes as long as a short run: few stages
        for pairs, group in groupby(protocol.conditions, key=attrgetter("pairs")):
            conditions = [*group]
            self.make_pairs(PairSet(pairs, seed) for seed in protocol.reporting_seeds)
            self.do_runs(
                f"runs on {pairs} pairs",
                (
                    self.reporting_run(condition, seed)
                    for condition in conditions
                    for seed in protocol.reporting_seeds
                ),
            )

    def base_run(self) -> Run:
        """Return the run that measures the base."""
        return Run(BASE, draws=self.protocol.reporting_draws)

    def reporting_run(self, condition: Condition, seed: int) -> Run:
        """Return the run of a condition on one reporting seed, measured for all of its views."""
        setting = self.chosen(condition.name)
        steps = {self.steps(view) for view in self.views if view.condition == condition.name}
        return Run(
            condition.name,
            seed,
            setting.learning_rate,
            setting.beta,
            tuple(sorted(steps)),
            self.protocol.reporting_draws,
        )

    @cached_property
    def views(self) -> list[View]:
        """Every condition at its own best, all objectives after as many rows as rDPO, and what
        else is claimed about.
        """
        protocol = self.protocol
        best = [View(condition.name) for condition in protocol.conditions]
        equal = [View(one.name, "equal rows") for one in protocol.conditions if one.is_tuned]
        claimed = [view for claim in protocol.claims for view in (claim.better, claim.than)]
        return [view for view in dict.fromkeys((*best, *equal, *claimed)) if view.condition != BASE]

    def steps(self, view: View) -> int:
        """Return the steps after which a view is taken."""
        condition, rdpo = (self.protocol.condition(name) for name in (view.condition, "rDPO"))
        if view.at == "best":
            return steps_for(self.chosen(view.condition).rows, condition)
        rows = self.chosen("rDPO").rows
        return steps_for(rows, condition if view.at == "equal rows" else rdpo)

    def answers(self, run: Run, steps: int) -> ModelAnswers | None:
        """Return the answers of a run after some steps; None if it stopped before or never ran."""
        if not run.file(self.out).is_file():
            return None
        if (run, steps) not in self._answers:
            draws = [self._draw(seed) for seed in run.draws]
            for point in read_json(run.file(self.out))["points"]:
                answers = [point["draws"][str(draw.seed)] for draw in draws]
                self._answers[run, point["steps"]] = ModelAnswers.of(draws, answers)
        return self._answers.get((run, steps))

    def scored(self, run: Run, steps: int) -> dict[str, float] | None:
        """Return the scores of a run after some steps; None where it stopped before."""
        if (run, steps) not in self._scores:
            answers = self.answers(run, steps)
            self._scores[run, steps] = None if answers is None else scores(answers)
        return self._scores[run, steps]

    def _draw(self, seed: int) -> Draw:
        if seed not in self._draws:
            self._draws[seed] = Draw(seed, self.protocol.eval_scenes)
        return self._draws[seed]

    def run_of(self, view: View, seed: int) -> tuple[Run, int]:
        """Return the run of a view on a reporting seed and the steps after which it is taken; the
        base is the same for all seeds.
        """
        if view.condition == BASE:
            return self.base_run(), 0
        return self.reporting_run(self.protocol.condition(view.condition), seed), self.steps(view)

    def scores_of(self, view: View) -> dict[int, dict[str, float] | None]:
        """Return the scores of a view by reporting seed; None where the run stopped before."""
        return {
            seed: self.scored(*self.run_of(view, seed)) for seed in self.protocol.reporting_seeds
        }


def steps_for(rows: int, condition: Condition) -> int:
    """Return the steps that read as many rows of 16 answers, at least one."""
    return max(1, round(rows / condition.rows_per_pair))
