"""The parts of every tiny family: a model whose weights matter, a tokenizer and a processor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available

from realign.demo.world import DESCRIBE, KINDS, question
from realign.modeling.processors import image_only

VOCABULARY = 300
WIDTH = 32
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model and the processor that goes with it."""

    model: PreTrainedModel
    processor: ProcessorMixin

    def save(self, folder: Path) -> Path:
        """Write both as a model folder, as the hub has them."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


def build(model_class: type, config: Any, processor: ProcessorMixin) -> Family:
    """Build the model with weights large enough for every position to matter to every other."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms and biases: no longer ones and zeros
                weight += 0.1 * torch.randn_like(weight)
            elif name.endswith("embed_tokens.weight"):  # often the head's as well
                nn.init.normal_(weight, std=0.3)
            elif "embed" not in name:
                nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
    model.tie_weights()
    return Family(model, processor)


def make_tokenizer(
    *special: str,
    bos: str | None = None,
    adds_bos: bool = False,
    named: dict[str, str],
    **options: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's special tokens.

    Args:
        special: Tokens without a role.
        bos: Beginning of a sequence.
        adds_bos: Whether the tokenizer itself writes it, as sentencepiece ones do.
        named: Attribute to token: ``image_token`` and the like.
        options: Of PreTrainedTokenizerFast; the tokens among them are special.
    """
    tokenizer = Tokenizer.from_str(_byte_pairs())
    roles = [bos, *named.values(), *(options[key] for key in ("eos_token", "pad_token"))]
    tokens = [*dict.fromkeys(token for token in (*roles, *special) if token)]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    if adds_bos and bos:
        index = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, index)]
        )
    if bos:
        options["bos_token"] = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=named, model_max_length=4096, **options
    )


@cache
def _byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [DESCRIBE, *map(question, KINDS), "There is a red house at the top left."],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return text options: a vocabulary with a few rows that no token uses, and special ids."""
    return {
        "vocab_size": len(tokenizer) + 5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def published_template(name: str) -> str:
    """The chat template that the hub's models of a family have, as TRL keeps it."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def with_videos(
    kind: type, image_processor: Any, tokenizer: Any, video: str, **options: Any
) -> ProcessorMixin:
    """A processor that takes videos too, where torchvision is; without that part elsewhere."""
    if is_torchvision_available():
        video_processor = getattr(transformers, video)()
        return kind(image_processor, tokenizer, video_processor, **options)
    return image_only(kind)(image_processor, tokenizer, None, **options)
