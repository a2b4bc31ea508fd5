"""Tables of the results in Markdown, and those of the paper in its shape beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from realign.demo.experiment.intervals import t_interval
from realign.demo.experiment.protocol import CONDITIONS

Results = Mapping[str, Any]

# POPE accuracy on random, popular and adversarial questions, LLaVA-v1.5-7B: arXiv 2502.13146,
# tables 1 and 4 to 6.
PAPER = {
    "base": (88.14, 87.23, 85.10),
    "image weight 0": (88.18, 87.30, 85.23),
    "image weight 0.25": (88.72, 87.60, 85.03),
    "image weight 0.5": (88.76, 87.53, 85.06),
    "image weight 0.75": (88.90, 87.70, 84.83),
    "rDPO": (88.65, 87.43, 85.16),
    "mDPO": (88.17, 87.13, 85.03),
    "sentence masks": (88.56, 87.60, 84.90),
}
PAPER_SPLITS = ("random", "popular", "adversarial")
MEASURES = {
    "free.chair_i": "CHAIR_i",
    "free.chair_s": "CHAIR_s",
    "free.recall": "recall",
    "half.recall_coupled": "recall, with partner",
    "half.recall_lone": "recall, without",
    "free.random.auc": "AUC random",
    "free.popular.auc": "AUC popular",
    "free.adversarial.auc": "AUC adversarial",
    "free.adversarial.accuracy": "accuracy adversarial",
    "free.adversarial.yes": "yes adversarial",
    "free.words": "words",
    "kl": "KL",
}
SHORT = {  # condition to its name in the short table
    "base": "base, not trained",
    "SFT": "SFT",
    "DPO": "DPO",
    "rDPO": "rDPO",
    "NLL weight 3": "rDPO, `nll_weight: 3`",
    "SFT, shortcut": "SFT, shortcut pairs",
    "DPO, shortcut": "DPO, shortcut pairs",
    "rDPO, shortcut": "rDPO, shortcut pairs",
    "vDPO, shortcut": "image pair alone, shortcut pairs",
}
SHORT_MEASURES = {
    "free.chair_i": "absent objects among those named (CHAIR_i)",
    "free.recall": "present objects named (recall)",
    "free.random.yes": "yes to random questions (50 is right)",
    "free.adversarial.auc": "AUC, adversarial questions (50 is chance)",
}
# In a claim: what a condition has that is rDPO but for this, and what rDPO has in its place.
VARIED = {
    "top_non_label": ("`rejected_scoring: top_non_label`", "`rejected_scoring: label`"),
    "random image": ("a random image", "the retrieved image"),
    "noised image": ("the same image under noise", "the retrieved image"),
    "nearest image": ("the nearest image", "the retrieved image"),
    "tenth image": ("the tenth image", "the retrieved image"),
    **{
        f"image weight {weight}": (f"image weight {weight}", "image weight 1")
        for weight in ("0", "0.25", "0.5", "0.75")
    },
    "NLL weight 3": ("NLL weight 3", "NLL weight 0"),
    "NLL weight 30": ("NLL weight 30", "NLL weight 0"),
    "LoRA": ("LoRA", "all weights trained"),
    "sentence masks": ("sentence masks", "segment masks"),
    "tau 0.51": ("tau 0.51", "tau 0.95"),
}
IN_CLAIMS = {"base": "the base", "symmetric": "the symmetric objective"}  # other names
HAVE_NO_BETA = {condition.name for condition in CONDITIONS if condition.objective == "sft"}
NOT_SHARES = ("free.words", "kl")
DASH = "—"


def tables(results: Results) -> str:
    """Return all tables as one Markdown text."""
    parts = (
        ("Claims", claims_table(results)),
        ("Conditions", views_table(results)),
        ("Beside the paper", paper_table(results)),
        ("Tuning", tuning_table(results)),
    )
    return "\n".join(f"## {title}\n\n{table}\n" for title, table in parts)


def claims_table(results: Results) -> str:
    """Return every claim with both intervals and its verdict; primary ones first, in bold."""
    rows = []
    for claim in results["claims"]:
        verb = "keeps up with" if claim["keeps_up"] else "is better than"
        better, than = claim["better"], claim["than"]
        statement = f"{_in_claim(better, than)} {verb} {_in_claim(than, better)}"
        verdict = claim["verdict"]
        if claim["is_primary"]:
            statement = f"**{statement}**"
            verdict += f"; all six at once: {claim.get('strict_verdict', DASH)}"
        rows.append(
            [
                statement,
                claim["measure"],
                _interval(claim["over_seeds"]),
                _interval(claim["over_images"]),
                verdict,
            ]
        )
    return _table(
        ["claim", "measure", "difference, over seeds", "over images of one seed", "verdict"], rows
    )


def views_table(results: Results) -> str:
    """Return mean and spread over seeds of every view."""
    rows = [
        [
            *(_name(view), str(view.get("learning_rate", "")), _beta(view["condition"], view)),
            *(str(view.get("steps", "")), *(_over_seeds(view, measure) for measure in MEASURES)),
        ]
        for view in results["views"]
    ]
    return _table(["condition", "rate", "beta", "steps", *MEASURES.values()], rows)


def short_table(results: Results) -> str:
    """Return the main measures of the main conditions."""
    best = {view["condition"]: view for view in results["views"] if view["at"] == "best"}
    rows = [
        [label, *(_over_seeds(best[name], measure) for measure in SHORT_MEASURES)]
        for name, label in SHORT.items()
    ]
    return _table(["trained with", *SHORT_MEASURES.values()], rows)


def paper_table(results: Results) -> str:
    """Return POPE accuracy as the paper prints it, ours beside it, with AUC and CHAIR_i."""
    rows = []
    for view in results["views"]:
        if view["condition"] not in PAPER or view["at"] != "best":
            continue
        theirs = (f"{value:.2f}" for value in PAPER[view["condition"]])
        ours = (_over_seeds(view, f"free.{split}.accuracy") for split in PAPER_SPLITS)
        more = (_over_seeds(view, name) for name in ("free.adversarial.auc", "free.chair_i"))
        rows.append([view["condition"], *theirs, *ours, *more])
    heads = [f"{whose} {split[0]}" for whose in ("paper", "here") for split in PAPER_SPLITS]
    return _table(["condition", *heads, "AUC adversarial", "CHAIR_i"], rows)


def tuning_table(results: Results) -> str:
    """Return every setting that was tried, the best ones in bold, and those on an edge named."""
    rows = []
    for name, search in results["tuning"].items():
        for setting in search["settings"]:
            keys = ("learning_rate", "beta", "rows")
            is_best = all(setting[key] == search["best"][key] for key in keys)
            values = [f"{setting['learning_rate']:g}", _beta(name, setting), str(setting["rows"])]
            score = f"{100 * setting['object_f1']:.2f}"
            seeds = [value for key, value in setting.items() if key.isdigit()]
            per_seed = [
                _mean([None if one is None else one[measure] for one in seeds], 100, 1)
                for measure in ("free.chair_i", "free.recall")
            ]
            mark = (
                f"best; last value of {', '.join(search['edges'])}" if search["edges"] else "best"
            )
            rows.append(
                [name, *values, f"**{score}**" if is_best else score, *per_seed, mark * is_best]
            )
    return _table(["condition", "rate", "beta", "rows", "object F1", "CHAIR_i", "recall", ""], rows)


def _name(view: Mapping[str, str]) -> str:
    at = view["at"]
    return view["condition"] if at == "best" else f"{view['condition']} ({at})"


def _in_claim(view: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return the name of one side of a claim, which says what it has that the other has not."""
    name, beside = view["condition"], other["condition"]
    if name in VARIED:
        name = f"rDPO with {VARIED[name][0]}"
    elif name == "rDPO" and beside in VARIED:
        name = f"rDPO with {VARIED[beside][1]}"
    name = IN_CLAIMS.get(name, name).replace(", shortcut", " on shortcut pairs")
    return name if view["at"] == "best" else f"{name} after {view['at']}"


def _beta(condition: str, setting: Mapping[str, Any]) -> str:
    """Return the beta of a setting; nothing for the base and for objectives without one."""
    has_none = condition in HAVE_NO_BETA or "beta" not in setting
    return "" if has_none else f"{setting['beta']:g}"


def _over_seeds(view: Mapping[str, Any], measure: str) -> str:
    values = [None if one is None else one[measure] for one in view["scores"].values()]
    scale = 1 if measure in NOT_SHARES else 100
    if view["condition"] == "base":
        return _mean(values[:1], scale, 1)
    if any(value is None for value in values):
        return DASH
    mean, low, high = t_interval([scale * value for value in values if value is not None])
    return f"{mean:.1f} ± {(high - low) / 2:.1f}" if math.isfinite(high) else f"{mean:.1f}"


def _mean(values: Iterable[float | None], scale: float, digits: int) -> str:
    known = [*values]
    if any(value is None for value in known):
        return DASH
    return f"{scale * math.fsum(v for v in known if v is not None) / len(known):.{digits}f}"


def _interval(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or None in interval.values():
        return DASH
    mean, low, high = (100 * (interval[end] or 0.0) for end in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
