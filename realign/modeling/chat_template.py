"""Chat templates: rendering of a row's conversation, and the position of the answer's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realign.errors import RefusedError


def user_turns(prompt: Sequence[Mapping[str, str]], num_images: int) -> list[dict[str, Any]]:
    """Return messages with lists of parts, the images before the text of the first user turn."""
    turns: list[dict[str, Any]] = []
    images = num_images
    for message in prompt:
        parts: list[dict[str, str]] = [{"type": "text", "text": message["content"]}]
        if message["role"] == "user" and images:
            parts = [{"type": "image"}] * images + parts
            images = 0
        turns.append({"role": message["role"], "content": parts})
    return turns


@dataclass(frozen=True)
class RenderedRow:
    """A templated conversation before image tokens are expanded."""

    prompt: str  # with the beginning of the assistant turn
    text: str  # the whole conversation
    answer_ids: list[int]  # tokens after the prompt
    num_scored: int  # number of scored tokens, from the first of answer_ids

    @property
    def scored_ids(self) -> list[int]:
        """Tokens of the answer and its end of turn, without later text of the template."""
        return self.answer_ids[: self.num_scored]


class Renderer:
    """Renderer of conversations with a processor's chat template; finds the answer's tokens."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # also those without a name, such as Gemma's end of turn, which tokenizer.json marks
        added = self.tokenizer.added_tokens_decoder
        self._special = set(self.tokenizer.all_special_ids) | {
            index for index, token in added.items() if token.special
        }

    def placeholders(self) -> list[str]:
        """Return the tokens that no text may contain: special ones and those of images."""
        special = self.tokenizer.convert_ids_to_tokens(sorted(self._special))
        named = (getattr(self.processor, f"{kind}_token", "") for kind in ("image", "video"))
        return [*special, *named]

    def adds_special_tokens(self, text: str) -> bool:
        """Return whether the tokenizer must add special tokens, if the template has not."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def render(
        self, prompt: Sequence[Mapping[str, str]], answer: str, num_images: int, where: str
    ) -> RenderedRow:
        """Apply the template to one conversation.

        Raises:
            RefusedError: The templated prompt is not a prefix of the templated conversation, or the
                answer is changed.
        """
        turns = user_turns(prompt, num_images)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        template = self.processor.apply_chat_template
        try:
            prompt_text = template(turns, add_generation_prompt=True, tokenize=False)
            text = template([*turns, reply], tokenize=False)
        except Exception as error:  # a template may raise any exception to refuse turns
            raise RefusedError(
                f"{where}: prompt must be what the chat template takes, got "
                f"{str(error).rstrip('.')}. Correct its turns or use another template."
            ) from None
        text = _with_whitespace_of(prompt_text, text)
        start = text.find(answer.strip(), len(prompt_text))
        if not text.startswith(prompt_text) or start < 0:
            raise RefusedError(
                f"{where}: the chat template must keep the prompt and the answer as they are, got "
                f"{text[-120:]!r} "
                f"after {prompt_text[-60:]!r}. Use a template whose generation prompt begins the "
                f"assistant turn."
            )
        end = start + len(answer.strip())
        if not self._ends_turn(text[end:]):
            text = text[:end] + self._end_of_sequence(text[end:], where)
        special = self.adds_special_tokens(text)
        prompt_ids = self.tokenizer(prompt_text, add_special_tokens=special).input_ids
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoded.input_ids[: len(prompt_ids)] != prompt_ids:
            raise RefusedError(
                f"{where}: the prompt's tokens change when the answer follows. Use another "
                f"template."
            )
        answer_ids = encoded.input_ids[len(prompt_ids) :]
        offsets = encoded.offset_mapping[len(prompt_ids) :]
        end_of_turn = next(
            (
                i
                for i, (begin, _) in enumerate(offsets)
                if begin >= end and answer_ids[i] in self._special
            ),
            None,
        )
        if end_of_turn is None:
            raise RefusedError(
                f"{where}: no end-of-turn token follows the answer, got {text[-60:]!r}. Make the "
                "tokenizer's end of turn a special token."
            )
        return RenderedRow(prompt_text, text, answer_ids, end_of_turn + 1)

    def _end_of_sequence(self, tail: str, where: str) -> str:
        """Return the end of a turn for a template that writes none, as LLaVA-1.5's."""
        if tail.strip() or not self.tokenizer.eos_token:
            raise RefusedError(
                f"{where}: the chat template of {type(self.processor).__name__} "
                f"{self.tokenizer.name_or_path} must end the answer with a special token or leave "
                f"it open, got {tail!r} and eos_token {self.tokenizer.eos_token!r}. Make the end "
                "of turn a special token of the tokenizer."
            )
        return str(self.tokenizer.eos_token)

    def _ends_turn(self, tail: str) -> bool:
        return any(
            i in self._special for i in self.tokenizer(tail, add_special_tokens=False).input_ids
        )


def _with_whitespace_of(prompt_text: str, text: str) -> str:
    """Return the conversation with the prompt's whitespace before the answer, if they differ in
    nothing else: LLaVA-OneVision's template writes "assistant " and a newline there, its generation
    prompt "assistant" and a newline.
    """
    head = prompt_text.rstrip()
    if text.startswith(prompt_text) or not text.startswith(head):
        return text
    return prompt_text + text[len(head) :].lstrip()
