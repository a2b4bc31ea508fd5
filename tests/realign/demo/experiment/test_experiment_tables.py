"""The tables of the experiment name what they compare, and show only settings that are used."""

from __future__ import annotations

from typing import Any

import pytest

from realign.demo.experiment.protocol import CLAIMS, CONDITIONS, FULL
from realign.demo.experiment.tables import VARIED, claims_table, tuning_table, views_table

INTERVAL = {"mean": 0.01, "low": 0.0, "high": 0.02}


def claim(better: str, than: str, at: str = "best", *, keeps_up: bool = False) -> dict[str, Any]:
    return {
        "better": {"condition": better, "at": "best"},
        "than": {"condition": than, "at": at},
        "measure": "free.recall",
        "keeps_up": keeps_up,
        "is_primary": False,
        "over_seeds": INTERVAL,
        "over_images": INTERVAL,
        "verdict": "holds",
    }


def statements(*claims: dict[str, Any]) -> list[str]:
    _, _, *rows = claims_table({"claims": claims}).splitlines()
    return [row.split(" | ")[0].removeprefix("| ") for row in rows]


@pytest.mark.parametrize(
    ("better", "than", "statement"),
    [
        ("rDPO", "base", "rDPO is better than the base"),
        (
            "rDPO",
            "random image",
            "rDPO with the retrieved image is better than rDPO with a random image",
        ),
        (
            "nearest image",
            "tenth image",
            "rDPO with the nearest image is better than rDPO with the tenth image",
        ),
        (
            "rDPO",
            "image weight 0.25",
            "rDPO with image weight 1 is better than rDPO with image weight 0.25",
        ),
        (
            "vDPO, shortcut",
            "DPO, shortcut",
            "vDPO on shortcut pairs is better than DPO on shortcut pairs",
        ),
    ],
)
def test_a_claim_states_the_compared_conditions(better: str, than: str, statement: str) -> None:
    assert statements(claim(better, than)) == [statement]


def test_a_claim_states_the_amount_of_training() -> None:
    assert statements(claim("rDPO", "DPO", "equal steps", keeps_up=True)) == [
        "rDPO keeps up with DPO after equal steps"
    ]


def test_every_variant_of_rdpo_has_a_name_in_claims() -> None:
    variants = {one.name for one in CONDITIONS if one.objective == "rdpo"} - {"rDPO"}
    assert {*VARIED} == {name for name in variants if not name.endswith(", shortcut")}
    both = [claim(one.better.condition, one.than.condition) for one in CLAIMS]
    shown = statements(*both)
    assert not [line for line in shown for name in VARIED if line.endswith(f"than {name}")]


def test_sft_shows_no_beta() -> None:
    assert FULL.condition("SFT, shortcut").objective == "sft"
    setting = {"learning_rate": 4e-4, "beta": 0.1, "rows": 72}
    views = [
        {"condition": name, "at": "best", "scores": {}, "steps": 72, **setting}
        for name in ("SFT", "SFT, shortcut", "DPO")
    ]
    for view in views:
        view["scores"] = {"21": None}
    _, _, *rows = views_table({"views": views}).splitlines()
    assert [row.split(" | ")[1:4] for row in rows] == [
        ["0.0004", "", "72"],
        ["0.0004", "", "72"],
        ["0.0004", "0.1", "72"],
    ]
    search = {"best": setting, "edges": [], "settings": [{**setting, "object_f1": 0.9, "11": None}]}
    _, _, sft, dpo = tuning_table({"tuning": {"SFT": search, "DPO": search}}).splitlines()
    assert sft.startswith("| SFT | 0.0004 |  | 72 | **90.00** |")
    assert dpo.startswith("| DPO | 0.0004 | 0.1 | 72 | **90.00** |")
