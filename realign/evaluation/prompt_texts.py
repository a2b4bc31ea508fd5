"""Parts of prompts that several benchmarks share, as LLaVA, lmms-eval and VLMEvalKit send them."""

from __future__ import annotations

from collections.abc import Mapping

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def list_choices(choices: Mapping[str, str]) -> str:
    """Return one line for each choice, its letter first."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())


def vlmevalkit_choices(question: str, choices: Mapping[str, str], hint: str) -> str:
    """Return the prompt of a multiple-choice question as VLMEvalKit sends it to any model."""
    hinted = f"Hint: {hint}\n" if hint else ""
    return (
        f"{hinted}Question: {question}\nOptions:\n{list_choices(choices)}\n"
        "Please select the correct answer from the options above. \n"
    )
