"""Model, processor and pairs of a step's shape, made from seeds: equal in every process."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from benchmarks.step.shapes import SHAPES, StepShape
from realign.data.records import Record
from realign.modeling.parts import VISION_MODULES, disable_dropout

SPECIAL = ("<pad>", "</s>", "<image>", "<vision>", "</vision>", "<video>", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}USER: {% else -%}ASSISTANT: {% endif -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}IMAGE {% else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- if message['role'] == 'user' -%}{{ ' ' }}{%- else -%}{{ '</s>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""
IMAGE_TEXT = {"llava": "<image>", "qwen2.5-vl": "<vision><image></vision>"}


@dataclass(frozen=True)
class Job:
    """The measurement that one process makes; it is passed as JSON."""

    scheme: str  # "ours", "authors" or "trl"
    shape: str
    mode: str  # "lora" or "full"
    pairs: int  # per step
    steps: int  # in all turns
    checkpoints: bool = False  # activation checkpointing
    dtype: str = "float32"
    device: str = "cpu"
    attention: str = "sdpa"
    liger: bool = False  # Liger's layers in the language model
    compiled: bool = False  # each layer of the language model
    plain_head: bool = False  # for TRL, whose own head is made for GPUs
    learning_rate: float = 1e-5
    threads: int = 2
    seed: int = 0
    out: str = field(default="")  # folder for files that a trainer writes in any case
    profile: str = ""  # file for a table of the last step's operators

    @property
    def step_shape(self) -> StepShape:
        """The shape of that name."""
        return SHAPES[self.shape]


class ImageQwenProcessor(Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without one for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Allow the processor for videos to be absent."""
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def build_processor(shape: StepShape) -> Any:
    """Return a processor whose every word is one token."""
    words = [*SPECIAL, *(f"w{i}" for i in range(shape.vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_start_token": "<vision>",
            "vision_end_token": "</vision>",
        },
    )
    template = CHAT_TEMPLATE.replace("IMAGE", IMAGE_TEXT[shape.family])
    height, width = shape.image_size
    if shape.family == "llava":
        size = {"height": height, "width": width}
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": height}, crop_size=size),
            tokenizer=fast,
            patch_size=shape.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    pixels = height * width
    image_processor = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
    return ImageQwenProcessor(
        image_processor=image_processor, tokenizer=fast, chat_template=template
    )


def build_config(shape: StepShape) -> LlavaConfig | Qwen2_5_VLConfig:
    """Return the model's configuration."""
    ids = {word: i for i, word in enumerate(SPECIAL)}
    text: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
        "tie_word_embeddings": False,
        **shape.text,
    }
    if shape.family == "llava":
        vision = CLIPVisionConfig(
            image_size=shape.image_size[0], patch_size=shape.patch_size, **shape.vision
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**text),
            image_token_index=ids["<image>"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    head = shape.text["hidden_size"] // shape.text["num_attention_heads"]
    sections = [head // 8, 3 * head // 16, 3 * head // 16]  # of M-RoPE: 16, 24, 24 for 128
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": sections,
        }},
        vision_config={**shape.vision, "out_hidden_size": shape.text["hidden_size"],
                       "fullatt_block_indexes": list(range(7, shape.vision["depth"], 8))},
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        vision_start_token_id=ids["<vision>"],
        vision_end_token_id=ids["</vision>"],
        tie_word_embeddings=False,
    )  # fmt: skip


def build_model(job: Job) -> PreTrainedModel:
    """Return the model with random weights, its vision tower frozen; equal in every process."""
    torch.manual_seed(job.seed)
    with torch.device(job.device):
        model = AutoModelForImageTextToText.from_config(
            build_config(job.step_shape),
            dtype=getattr(torch, job.dtype),
            attn_implementation=job.attention,
        )
    disable_dropout(model)
    vision_tower(model)[1].requires_grad_(False)
    return model


def vision_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of the vision tower; Qwen's contains the projector."""
    return next(
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in VISION_MODULES
    )


def lora_config(job: Job, model: PreTrainedModel) -> Any:
    """Return adapters on all linear layers except the vision tower's and the head, as the paper."""
    from peft import LoraConfig

    rank = job.step_shape.lora_rank
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=rf".*{vision_tower(model)[0].rpartition('.')[2]}.*",
    )


def build_records(job: Job) -> list[Record]:
    """Return the pairs of one step, of random words and pixels."""
    shape, rng = job.step_shape, Random(job.seed)
    num_words = shape.vocabulary - len(SPECIAL)
    # USER: and ASSISTANT:, and the marks around an image, are tokens of the prompt too
    num_marks = 2 + shape.num_images * (2 if shape.family == "qwen2.5-vl" else 0)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(num_words)}" for _ in range(count))

    def images() -> tuple[bytes, ...]:
        return tuple(_png(shape.image_size, rng) for _ in range(shape.num_images))

    return [
        Record(
            id=f"pair{number}",
            images=images(),
            prompt=({"role": "user", "content": words(shape.prompt_tokens - num_marks)},),
            chosen=words(shape.answer_tokens - 1),
            rejected=words(shape.answer_tokens - 1),
            rejected_images=images(),
        )
        for number in range(job.pairs)
    ]


def _png(size: tuple[int, int], rng: Random) -> bytes:
    pixels = np.random.default_rng(rng.randrange(1 << 32)).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def training_options(job: Job) -> dict[str, Any]:
    """Return the options of ``TrainingArguments`` that every scheme gets."""
    return {
        "output_dir": job.out,
        "per_device_train_batch_size": job.pairs,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "gradient_checkpointing": job.checkpoints,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": job.seed,
    }
