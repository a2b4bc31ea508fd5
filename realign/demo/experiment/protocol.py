"""The protocol of the experiment: its conditions, seeds, tuning grids and claims.
``docs/experiment.md`` describes it and gives the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# Number of answers that a step scores per pair: the cells of the objective.
ROWS_PER_PAIR: Mapping[str, int] = {
    "sft": 1,
    "dpo": 2,
    "vdpo": 2,
    "rdpo": 3,
    "mdpo": 3,
    "symmetric": 4,
}
PAIRS_PER_STEP = 16
WARMUP_STEPS = 5
SMALLEST_EFFECT = 0.01  # one percentage point; smaller differences do not matter here
BASE = "base"


@dataclass(frozen=True)
class Condition:
    """One way to align the base.

    Attributes:
        name: Name of the condition.
        objective: A key of ``ROWS_PER_PAIR``.
        pairs: Kind of the pairs, a key of :data:`realign.demo.experiment.pairs.KINDS`.
        rejected_image: Which image the image pair rejects, a key of
            :data:`realign.demo.experiment.records.REJECTED_IMAGES`.
        image_weight: Weight of the image pair.
        nll_weight: Weight of the chosen answer's mean negative log-likelihood.
        rejected_scoring: ``label`` or ``top_non_label``.
        lora: Whether low-rank adapters train instead of all weights.
        settings_of: Condition whose tuned settings are used; empty for its own.
    """

    name: str
    objective: str
    pairs: str = "pipeline"
    rejected_image: str = "retrieved"
    image_weight: float = 1.0
    nll_weight: float = 0.0
    rejected_scoring: str = "label"
    lora: bool = False
    settings_of: str = ""

    @property
    def rows_per_pair(self) -> int:
        """Number of answers that a step scores per pair."""
        return ROWS_PER_PAIR[self.objective]

    @property
    def is_tuned(self) -> bool:
        """Return whether the condition has a tuning of its own."""
        return not self.settings_of


# In the order of their importance: if time is short, the last ones are dropped.
CONDITIONS = (
    Condition("DPO", "dpo"),
    Condition("SFT", "sft"),
    Condition("rDPO", "rdpo"),
    Condition("mDPO", "mdpo"),
    Condition("symmetric", "symmetric"),
    Condition("vDPO", "vdpo"),
    Condition("top_non_label", "rdpo", rejected_scoring="top_non_label"),
    Condition("DPO, shortcut", "dpo", pairs="shortcut", settings_of="DPO"),
    Condition("rDPO, shortcut", "rdpo", pairs="shortcut", settings_of="rDPO"),
    Condition("vDPO, shortcut", "vdpo", pairs="shortcut", settings_of="vDPO"),
    Condition("SFT, shortcut", "sft", pairs="shortcut", settings_of="SFT"),
    Condition("random image", "rdpo", rejected_image="random", settings_of="rDPO"),
    Condition("noised image", "rdpo", rejected_image="noised", settings_of="rDPO"),
    Condition("nearest image", "rdpo", rejected_image="nearest", settings_of="rDPO"),
    Condition("tenth image", "rdpo", rejected_image="tenth", settings_of="rDPO"),
    Condition("image weight 0", "rdpo", image_weight=0.0, settings_of="rDPO"),
    Condition("image weight 0.25", "rdpo", image_weight=0.25, settings_of="rDPO"),
    Condition("image weight 0.5", "rdpo", image_weight=0.5, settings_of="rDPO"),
    Condition("image weight 0.75", "rdpo", image_weight=0.75, settings_of="rDPO"),
    Condition("NLL weight 3", "rdpo", nll_weight=3.0, settings_of="rDPO"),
    Condition("NLL weight 30", "rdpo", nll_weight=30.0, settings_of="rDPO"),
    Condition("LoRA", "rdpo", lora=True),
    Condition("sentence masks", "rdpo", pairs="sentence", settings_of="rDPO"),
    Condition("tau 0.51", "rdpo", pairs="tau 0.51", settings_of="rDPO"),
)


class View(NamedTuple):
    """A condition after a number of steps: its best one, or one that is equal to rDPO's."""

    condition: str
    at: str = "best"  # or "equal rows" or "equal steps", both those of rDPO's best


@dataclass(frozen=True)
class Claim:
    """A statement that the runs can confirm or refute.

    Attributes:
        better: View that is claimed to be better, or not to be worse.
        than: View with which it is compared.
        measure: A key of the result of :func:`realign.demo.experiment.scores.scores`.
        sign: 1 if a higher measure is better, -1 if a lower one is.
        keeps_up: Whether the claim is only that ``better`` is not worse.
        is_primary: Whether it is one of the six main claims.
    """

    better: View
    than: View
    measure: str
    sign: int = 1
    keeps_up: bool = False
    is_primary: bool = False


def _less(
    better: View, than: View, measure: str = "free.chair_i", *, is_primary: bool = False
) -> Claim:
    return Claim(better, than, measure, sign=-1, is_primary=is_primary)


def _claims() -> tuple[Claim, ...]:
    base, dpo, rdpo, sft = View(BASE), View("DPO"), View("rDPO"), View("SFT")
    dpo_equal = View("DPO", "equal rows")
    shortcut = {name: View(f"{name}, shortcut") for name in ("DPO", "rDPO", "vDPO")}
    auc = "free.adversarial.auc"
    primary = (
        _less(rdpo, base, is_primary=True),
        _less(rdpo, dpo, is_primary=True),
        _less(rdpo, dpo_equal, is_primary=True),
        _less(rdpo, sft, is_primary=True),
        _less(rdpo, View("random image"), is_primary=True),
        Claim(shortcut["rDPO"], shortcut["DPO"], auc, is_primary=True),
    )
    kept = tuple(
        Claim(rdpo, other, measure, keeps_up=True)
        for other in (base, dpo, dpo_equal, sft)
        for measure in ("free.recall", "half.recall_coupled")
    )
    moved = (
        _less(rdpo, View("DPO", "equal steps")),
        Claim(rdpo, dpo, "free.adversarial.accuracy"),
        Claim(rdpo, dpo, auc),
    )
    others = (
        *(_less(View(name), base) for name in ("DPO", "SFT", "vDPO")),
        *(_less(rdpo, View(name)) for name in ("mDPO", "symmetric", "vDPO", "top_non_label")),
    )
    ablations = (
        _less(rdpo, View("noised image")),
        _less(View("nearest image"), View("tenth image")),
        *(_less(rdpo, View(one.name)) for one in CONDITIONS if one.name.startswith("image weight")),
        *(_less(rdpo, View(name)) for name in ("NLL weight 3", "NLL weight 30", "LoRA")),
        *(_less(rdpo, View(name)) for name in ("sentence masks", "tau 0.51")),
    )
    of_shortcut = (
        Claim(shortcut["rDPO"], shortcut["DPO"], "free.recall", keeps_up=True),
        Claim(shortcut["vDPO"], shortcut["DPO"], auc),
        Claim(shortcut["vDPO"], shortcut["DPO"], "free.recall"),
        Claim(base, shortcut["DPO"], "free.recall"),
    )
    return (*primary, *kept, *moved, *others, *ablations, *of_shortcut)


CLAIMS = _claims()


@dataclass(frozen=True)
class Grid:
    """The settings over which an objective is tuned.

    Attributes:
        learning_rates: Learning rates, tried with ``betas[0]``.
        betas: Betas, tried with the best learning rate; the first one is the paper's.
        rows: Numbers of rows, of 16 answers each, after which a run is scored.
    """

    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    betas: tuple[float, ...] = (0.1, 0.03, 0.3)
    rows: tuple[int, ...] = (36, 72, 144, 288)


@dataclass(frozen=True)
class Protocol:
    """Everything that the results depend on, except the base model and the code.

    Attributes:
        conditions: Conditions to compare.
        claims: Claims to test.
        tuning_seeds: Seeds of the training runs by which settings are chosen.
        reporting_seeds: Seeds of the training runs on which claims are tested.
        tuning_draw: Seed of the evaluation scenes by which settings are chosen.
        reporting_draws: Seeds of the evaluation scenes on which claims are tested.
        scenes: Number of training scenes per seed.
        eval_scenes: Number of free scenes, and of half scenes, per evaluation draw.
        kl_captions: Number of captions per draw for the KL divergence.
        grid: Grid of objectives with a beta.
        grid_without_beta: Grid of SFT, with the same number of runs.
        lora_factor: Factor of the learning rates of LoRA.
        max_extensions: Largest number of runs after those of the grid, per tuning seed.
        resamples: Number of draws of the bootstrap over images.
    """

    conditions: tuple[Condition, ...] = CONDITIONS
    claims: tuple[Claim, ...] = CLAIMS
    tuning_seeds: tuple[int, ...] = (11, 12)
    reporting_seeds: tuple[int, ...] = (21, 22, 23, 24, 25)
    tuning_draw: int = 31
    reporting_draws: tuple[int, ...] = (41, 42)
    scenes: int = 260
    eval_scenes: int = 250
    kl_captions: int = 100
    grid: Grid = field(default_factory=Grid)
    grid_without_beta: Grid = field(
        default_factory=lambda: Grid((2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4), (0.1,))
    )
    lora_factor: float = 5.0
    max_extensions: int = 8
    resamples: int = 500

    def condition(self, name: str) -> Condition:
        """Return a condition by its name."""
        return next(condition for condition in self.conditions if condition.name == name)

    def grid_of(self, condition: Condition) -> Grid:
        """Return the grid over which a condition is tuned."""
        grid = self.grid_without_beta if condition.objective == "sft" else self.grid
        factor = self.lora_factor if condition.lora else 1.0
        rates = tuple(factor * rate for rate in grid.learning_rates)
        return Grid(rates, grid.betas, grid.rows)


FULL = Protocol()
# Small enough for a test of the code; its results mean nothing.
SMOKE = Protocol(
    # pairs of this kind need no generation
    conditions=tuple(Condition(name, name.lower(), pairs="shortcut") for name in ("DPO", "rDPO")),
    claims=(
        _less(View("rDPO"), View("DPO"), is_primary=True),
        Claim(View("rDPO"), View(BASE), "free.recall", keeps_up=True),
        _less(View("rDPO"), View("DPO", "equal steps")),
    ),
    tuning_seeds=(11,),
    reporting_seeds=(21, 22),
    reporting_draws=(41,),
    scenes=24,
    eval_scenes=4,
    kl_captions=2,
    grid=Grid((1e-4,), (0.1,), (6,)),
    max_extensions=0,
    resamples=20,
)
