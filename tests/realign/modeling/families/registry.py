"""Every family by name."""

from __future__ import annotations

from collections.abc import Callable

from tests.realign.modeling.families import (
    gemma,
    hybrid,
    idefics,
    internvl,
    janus,
    llava,
    llava_onevision,
    qwen_vl,
)
from tests.realign.modeling.families.family import Family

FAMILIES: dict[str, Callable[[], Family]] = {
    "llava-1.5": llava.llava_1_5,
    "llava-1.6-vicuna": llava.llava_1_6_vicuna,
    "llava-1.6-mistral": llava.llava_1_6_mistral,
    "llava-1.6-single-view": llava.llava_1_6_single_view,
    "qwen2-vl": qwen_vl.qwen2_vl,
    "qwen2.5-vl": qwen_vl.qwen2_5_vl,
    "qwen3-vl": qwen_vl.qwen3_vl,
    "janus": janus.janus,
    "llava-onevision": llava_onevision.llava_onevision,
    "internvl": internvl.internvl,
    "idefics3": idefics.idefics3,
    "smolvlm": idefics.smolvlm,
    "gemma-3": gemma.gemma3,
    "paligemma": gemma.paligemma,
}
# whose answers cannot share a prefix
SEPARATE: dict[str, Callable[[], Family]] = {
    "paligemma-2": gemma.paligemma2,
    "qwen3.5": hybrid.qwen3_5,
}
# variants that only change which positions see which
SLIDING: dict[str, Callable[[], Family]] = {
    "llava-1.6-mistral-sliding": llava.llava_1_6_mistral_sliding,
    "qwen2-vl-sliding": qwen_vl.qwen2_vl_sliding,
}
