"""Configuration: one pydantic section per command.

A field is declared here and nowhere else: its name, type, default and docstring become the flag,
the key of the YAML file and of ``--set``, and the help (:mod:`realign.config_file`).
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

RejectedScoring = Literal["label", "top_non_label"]
# resized and recompressed copies are within 6 of 64 bits, see realign/data/perceptual_hash.py
NEAR_DUPLICATE_BITS = 6


@dataclass(frozen=True)
class Shown:
    """Presentation of a field on the command line, beyond its name, type, default and docstring.

    Attributes:
        group: Heading in the help of this field and of those after it, until the next heading.
        flag: Name of the flag, if it is not the field's.
        metavar: Placeholder of the value, if it is not the type.
    """

    group: str = ""
    flag: str = ""
    metavar: str = ""


def _types(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation consists of."""
    arguments = typing.get_args(annotation)
    for argument in arguments:
        yield from _types(argument)
    if not arguments:
        yield annotation


def _parse_percent(value: Any) -> Any:
    """Return 0.001 for "0.1%", and refuse a truth value; leave anything else to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"must be a share from 0 to 1, got {str(value).lower()}. Write the number")
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Share = Annotated[float, BeforeValidator(_parse_percent), Field(ge=0, le=1), Shown(metavar="SHARE")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range of numpy's seeds, the narrowest
LearningRate = Annotated[float, Field(gt=0, le=1)]
HammingDistance = Annotated[int, Field(ge=0, le=63)]  # of 64 bits; 64 would be any two images


class Effect(Enum):
    """Effect of an option on results. An option without a mark changes a run and is part of its
    identity.
    """

    NUMBERS = "numbers"
    """Numerics, which policy and reference share: part of the reference cache's identity."""
    NONE = "none"
    """No effect on results, except through the content of the file or model that it names."""


Dtype = Annotated[Literal["auto", "float32", "bfloat16"], Effect.NUMBERS]
Attention = Annotated[Literal["sdpa", "flash"], Effect.NUMBERS]
Quantization = Annotated[Literal["nf4"] | None, Effect.NUMBERS]
SharedPrefix = Annotated[bool | None, Effect.NUMBERS]
ChangesNumbers = Annotated[bool, Effect.NUMBERS]


class Section(BaseModel):
    """The options of one command, or of one part of it. A field's docstring is its help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a truth value as a number: YAML reads ``yes`` as true, and pydantic that as 1."""
        if isinstance(value, bool):
            allowed = {*_types(cls.model_fields[str(info.field_name)].annotation)}
            if bool not in allowed and allowed & {int, float}:
                raise ValueError(
                    f"must be a number, got {str(value).lower()}, as YAML reads yes, no, on and "
                    "off. Write the number"
                )
        return value

    def marked(self, effect: Effect) -> dict[str, Any]:
        """Return the options that are declared with ``effect``, by name."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name in fields if effect in fields[name].metadata}


class GeneratorSection(Section):
    """A model that answers: loaded here, or behind an OpenAI-compatible server."""

    model: str
    """Model folder or hub id; with ``endpoint``, the model's name on the server."""
    endpoint: str | None = None
    """Base URL of the server, such as http://localhost:8000/v1; by default the model runs here."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key. The key itself is never written anywhere."""
    concurrency: PositiveInt = 8
    """Concurrent requests. This and the options below require an endpoint."""
    timeout_s: PositiveFloat = 120.0
    """Seconds after which a request counts as failed."""
    max_retries: int = Field(default=6, ge=0, le=1000)
    """Retries of a request after status 429 or 5xx, a timeout or a broken connection."""
    temperature: NonNegativeFloat | None = 0.0
    """Sampling temperature. 0 is greedy; null sends none, for models that accept no other."""
    length_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """Name of the length limit in a request. Use ``max_tokens`` for servers that ignore the newer
    name, such as those from before 2025 and ``transformers serve`` before 5.23."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Additional fields of each request. Do not put secrets here: runs may record them."""

    @model_validator(mode="after")
    def _check_endpoint(self) -> GeneratorSection:
        extra = sorted(self.model_fields_set - {"model", "endpoint"})
        if self.endpoint is None and extra:
            raise ValueError(
                f"{', '.join(extra)} require an endpoint; a model that runs here decodes greedily. "
                "Add endpoint, or drop them"
            )
        return self


class BuildConfig(Section):
    """``realign build``: make a dual-preference dataset from images, prompts and answers."""

    source: Path
    """Source file or folder: JSONL of ``{"image", "prompt", "answer"}``, LLaVA-Instruct JSON,
    parquet with images, or a dataset of text pairs.
    """
    images: Path | None = None
    """Image folder; not needed if the source contains the images."""
    image_name: str = Field(default="{name}", pattern=r"\{name\}")
    """File name of the image that the source calls ``{name}``, such as COCO_train2014_{name} for
    LLaVA-Instruct's images in COCO's train2014.
    """
    model: str
    """Vision-language model to be aligned: folder or hub id."""
    out: Path
    """Output folder."""
    format: str | None = None
    """Layout of the source, see docs/guides/formats.md; detected if not given."""
    max_pixels: PositiveInt | None = None
    """Largest number of pixels of an image; by default 89,478,485, the most that training opens.
    A larger image up to this limit is replaced by a copy, halved until training opens it.
    """
    sample: PositiveInt | None = None
    """Number of rows to build from, drawn at random by ``seed``; by default all. Images of other
    rows are not read.
    """
    turns: Literal["first", "last", "each"] = "first"
    """Answers of a conversation that become rows: the first, the last, or each one together with
    the turns before it.
    """
    max_reject: Share = 0.0
    """Largest share of bad source rows, such as 0.001 or 0.1%. They are left out and listed in
    rejected.jsonl; the build is refused if there are more.
    """
    annotator: GeneratorSection | None = None
    """Model that answers the rows without an answer."""
    annotation_prompt: str = Field(default="{instruction}", pattern=r"\{instruction\}")
    """Prompt of the annotator; ``{instruction}`` stands for the prompt of the row."""
    mask: Annotated[Literal["rule", "model"], Shown("Masking")] = "rule"
    """Method of masking: ``rule`` uses a lexicon, ``model`` a model with the paper's prompt;
    answers that the model fails to mask are masked by the lexicon.
    """
    mask_level: Literal["segment", "sentence"] = "segment"
    """Text that one [MASK] replaces: a visual phrase, or a whole sentence that contains one."""
    mask_retries: int = Field(default=1, ge=0, le=3)
    """Retries when the masking model changes other words."""
    masker: GeneratorSection | None = None
    """Model that masks; by default the model to be aligned."""
    lexicon: Path | None = None
    """File of the phrases that can be masked; by default the packaged English lexicon."""
    mask_rates: Annotated[dict[str, Share], Shown(metavar="CATEGORY=SHARE")] = Field(
        default_factory=dict
    )
    """Share of the phrases of a lexicon category to mask, with ``mask`` rule; 1, as in the paper,
    for a category that is not given.
    """
    encoder: Annotated[str, Shown("Retrieval")] = "model"
    """Model of the image embeddings: ``model`` for vision tower and projector of the model to be
    aligned, or a CLIP or SigLIP model such as ``openai/clip-vit-large-patch14``, as in the paper.
    """
    index: Literal["exact", "flat", "ivf", "hnsw"] = "exact"
    """Search for the nearest images: ``exact`` with PyTorch, the others with FAISS."""
    top_k: PositiveInt = 10
    """Number of nearest images that may be tried."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Smallest cosine similarity of a candidate image."""
    max_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Largest cosine similarity of a candidate image."""
    max_hamming: HammingDistance | None = NEAR_DUPLICATE_BITS
    """Images whose perceptual hashes differ in at most this many of 64 bits count as near
    duplicates and are no candidates for each other; null allows them.
    """
    inducer: Annotated[GeneratorSection | None, Shown("Rejected answers")] = None
    """Server that runs the model to be aligned; without it the model is loaded here."""
    similarity: str = "lexical"
    """Similarity of completion and answer: ``lexical``, or a sentence-transformers model such as
    ``sentence-transformers/all-mpnet-base-v2``.
    """
    threshold: float = Field(default=0.95, gt=0, le=1)
    """Similarity to the answer below which a completion is accepted (tau in the paper)."""
    min_length_ratio: NonNegativeFloat = 1 / 3
    """Smallest length of a completion, as a multiple of the answer's number of words."""
    max_length_ratio: PositiveFloat = 3.0
    """Largest length of a completion, as a multiple of the answer's number of words."""
    keep_unmasked: bool = False
    """Accept only completions that keep every word that was not masked."""
    batch_size: Annotated[PositiveInt, Shown("Generation and execution")] = 32
    """Rows per generation call."""
    window: PositiveInt = 256
    """Consecutive source rows that are sorted into generation batches together."""
    shard_size: PositiveInt = 256
    """Rows per shard, rounded up to whole windows. A killed worker loses at most one shard."""
    engine: Literal["process", "ray"] = "process"
    """Place of the work: processes on this machine, or a Ray cluster. Engine, number of
    workers and shard size do not change the result.
    """
    workers: PositiveInt | None = None
    """Processes or Ray actors; by default one per GPU, or as many as cores and memory allow."""
    threads: PositiveInt = 1
    """CPU threads per worker. Another number can change the last bits of a result."""
    max_new_tokens: PositiveInt = 512
    """Longest completion in tokens."""
    max_length: PositiveInt | None = None
    """Longest prompt in tokens, image tokens included; by default the model's
    max_position_embeddings. Rows with a longer prompt are dropped and counted.
    """
    dtype: Dtype = "auto"
    """Dtype of the weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    seed: Seed = 0
    """Seed of the sample and of the choice of masked phrases; it is also sent to servers."""

    @model_validator(mode="after")
    def _check_masker(self) -> BuildConfig:
        if self.masker is not None and self.mask == "rule":
            raise ValueError("masker requires mask: model, got mask: rule. Set it, or drop masker")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> BuildConfig:
        low, high = self.min_length_ratio, self.max_length_ratio
        if low > high:
            raise ValueError(
                f"min_length_ratio must be at most max_length_ratio {high:g}, got {low:g}. Lower it"
            )
        return self


class CacheConfig(Section):
    """``realign cache``: compute the reference log-probabilities of every row once."""

    model: str
    """Reference model, the one that training starts from: folder or hub id."""
    data: Path
    """Dataset: parquet file, folder of ``realign build``, or JSON."""
    out: Path
    """Cache folder. Several models can share one."""
    images: Path | None = None
    """Image folder; required for JSON."""
    cells: Annotated[Literal[3, 4], Shown("Scoring")] = 3
    """Sequences per pair: chosen, text_rejected and image_rejected; 4 adds both_rejected for the
    symmetric objective.
    """
    rejected_scoring: RejectedScoring = "label"
    """Scoring of rejected answers; ``top_non_label`` is that of the authors' code, see
    docs/paper.md.
    """
    batch_size: PositiveInt = 8
    """Pairs per forward pass."""
    shard_size: PositiveInt = 1024
    """Rows per shard, rounded up to whole batches. A killed run loses at most one shard."""
    max_length: PositiveInt | None = None
    """Longest row in tokens, image tokens included. A longer row is an error, never cut."""
    dtype: Annotated[Dtype, Shown("Numerics (as in training)")] = "auto"
    """Dtype of the weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    shared_prefix: SharedPrefix = None
    """Compute image and prompt once for both answers of a pair; by default where the model can."""
    attention: Attention = "sdpa"
    """Attention kernel; ``flash`` (FlashAttention-2) requires flash-attn, a GPU and bfloat16."""
    liger: ChangesNumbers = False
    """Use liger-kernel's fused layers; requires a GPU."""
    quantization: Quantization = None
    """``nf4`` keeps the language model's weights in 4 bits; requires a GPU and bitsandbytes."""
    autocast: ChangesNumbers = False
    """Compute in bfloat16 with float32 weights."""


LoraNumber = Annotated[int, Field(gt=0, lt=2**31)]  # the sizes that torch's products take


class LoraSection(Section):
    """Low-rank adapters (LoRA, with peft)."""

    r: LoraNumber = 128
    """Rank; 128 in the paper."""
    alpha: LoraNumber = 256
    """Scaling numerator; 256 in the paper."""
    targets: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the layers that get an adapter, or all-linear as in the paper; the authors' code
    uses q_proj, k_proj, v_proj and o_proj. Frozen parts get none; a name that matches no layer is
    refused.
    """


class TrainConfig(Section):
    """``realign train``: rDPO on a dual-preference dataset.

    Objective, beta, learning rate, schedule, epochs and batch default to the paper's values. The
    paper trains LoRA adapters; here all weights train unless ``lora`` is set.

    Example::

        >>> from pathlib import Path
        >>> from realign import TrainConfig
        >>> config = TrainConfig(model="model", data=Path("pairs.parquet"), out=Path("run"))
        >>> config.objective, config.beta
        ('rdpo', 0.1)
    """

    model: Annotated[str, Effect.NONE]
    """Vision-language model to align: folder or hub id."""
    data: Annotated[Path, Effect.NONE]
    """Dataset: parquet file, folder of ``realign build``, or JSON."""
    out: Annotated[Path, Effect.NONE]
    """Run folder, for metrics.jsonl, steps/ and checkpoint/."""
    images: Annotated[Path | None, Effect.NONE] = None
    """Image folder; required for JSON."""
    cache: Annotated[Path | None, Effect.NONE] = None
    """Folder of ``realign cache``; without it the reference log-probabilities are computed first,
    into ``out/cache``.
    """
    accept_numerics: bool = False
    """Accept an imported cache, or one that differs only in numerics (machine, versions, layout),
    if 64 rows computed here agree; accepted_numerics.json records how well.
    """
    objective: Annotated[
        Literal["rdpo", "dpo", "vdpo", "mdpo", "symmetric", "sft"], Shown("Objective")
    ] = "rdpo"
    """Loss to minimize; ``vdpo`` is the image pair alone, ``sft`` the chosen answers alone."""
    beta: PositiveFloat = 0.1
    """KL strength of the answer-pair term."""
    image_beta: PositiveFloat | None = None
    """KL strength of the image-pair term; by default ``beta``. Not with dpo and sft."""
    image_weight: NonNegativeFloat = 1.0
    """Weight of the image-pair term. Not with dpo and sft."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's mean negative log-likelihood; not in the paper."""
    rejected_scoring: RejectedScoring = "label"
    """Scoring of rejected answers; ``top_non_label`` is that of the authors' code, see
    docs/paper.md.
    """
    learning_rate: Annotated[LearningRate, Shown("Optimization")] = 1e-5
    """Peak learning rate."""
    projector_learning_rate: LearningRate | None = None
    """Peak learning rate of the projector or its adapter; by default ``learning_rate``."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up; all but constant end at 0."""
    epochs: PositiveFloat = 1.0
    """Passes over the dataset."""
    batch_size: PositiveInt = 1
    """Pairs per device per micro-batch."""
    pairs_per_step: PositiveInt = 32
    """Pairs per update of the weights, over all devices; 32 in the paper. Each device accumulates
    as many micro-batches as necessary.
    """
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient norm above which gradients are clipped; 0 disables clipping."""
    lora: Annotated[LoraSection | None, Shown("Trained parts")] = None
    """Train low-rank adapters instead of all weights; the paper uses rank 128 and alpha 256."""
    train_projector: bool = False
    """With lora, train the projector's own weights in float32 instead of an adapter on it. They are
    saved with the adapter.
    """
    quantization: Quantization = None
    """With lora, ``nf4`` keeps the language model's weights in 4 bits (QLoRA), also for the
    reference; requires a GPU and bitsandbytes.
    """
    freeze_vision: bool = True
    """Do not train the vision tower."""
    freeze_projector: bool = False
    """Do not train the projector between vision tower and language model."""
    freeze_language: bool = False
    """Do not train the language model and its head."""
    gradient_checkpointing: Annotated[bool, Shown("Speed, memory and precision")] = False
    """Recompute activations in the backward pass, to save memory."""
    shared_prefix: SharedPrefix = None
    """Compute image and prompt once for both answers of a pair; by default where the model can."""
    attention: Attention = "sdpa"
    """Attention kernel; ``flash`` (FlashAttention-2) requires flash-attn, a GPU and bfloat16."""
    liger: ChangesNumbers = False
    """Use liger-kernel's fused normalization and MLP, also for the reference; requires a GPU. Its
    rotary embedding and losses are not used.
    """
    check_first_step: Annotated[bool, Effect.NONE] = True
    """Stop if the first loss differs from that of a policy that equals its reference."""
    workers: Annotated[NonNegativeInt, Effect.NONE] = 0
    """Processes that prepare batches; 0 prepares them between the steps."""
    max_length: Annotated[PositiveInt | None, Effect.NONE] = None
    """Longest row in tokens, image tokens included. A longer row is an error, never cut."""
    dtype: Dtype = "auto"
    """Dtype of the weights; ``auto`` is bfloat16 on a GPU with lora, and float32 otherwise, because
    bfloat16 weights lose updates of 1e-5. A given cache must have the same dtype.
    """
    autocast: ChangesNumbers = False
    """Compute in bfloat16 while weights and optimizer stay in float32, also for the reference.
    Recommended for full fine-tuning on a GPU.
    """
    logging_steps: Annotated[PositiveInt, Shown("Logging and checkpoints")] = 10
    """Steps between lines of metrics.jsonl. The first and the last step are always logged."""
    save_steps: PositiveInt = 100
    """Steps between checkpoints. A killed run loses at most this many."""
    seed: Seed = 0
    """Seed of the order of rows and of the adapters' initial weights."""
    report_to: Annotated[list[str], Effect.NONE, Shown(metavar="TRACKER")] = Field(
        default_factory=list
    )
    """Experiment trackers of transformers.Trainer, such as tensorboard or wandb, whose packages are
    installed.
    """

    @field_validator("report_to", mode="before")
    @classmethod
    def _read_one_name(cls, value: Any) -> Any:
        """Read a name as a list of one; ``none`` is transformers' name of an empty list."""
        names = [value] if isinstance(value, str) else value
        return [] if names == ["none"] else names

    @model_validator(mode="after")
    def _check_parts(self) -> TrainConfig:
        for option, is_set in (
            ("train_projector", self.train_projector),
            ("quantization", self.quantization is not None),
        ):
            if is_set and self.lora is None:
                raise ValueError(f"{option} requires lora, got none. Add lora")
        for option, is_set in (
            ("projector_learning_rate", self.projector_learning_rate is not None),
            ("train_projector", self.train_projector),
        ):
            if is_set and self.freeze_projector:
                raise ValueError(f"{option} is set while freeze_projector is. Drop one of them")
        if self.freeze_vision and self.freeze_projector and self.freeze_language:
            raise ValueError(
                "freeze_vision, freeze_projector and freeze_language leave nothing to train. Drop "
                "one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> TrainConfig:
        if self.autocast and self.lora is not None:
            raise ValueError(
                "autocast is set with lora, whose base is kept in bfloat16 already. Drop autocast"
            )
        if self.autocast and self.dtype == "bfloat16":
            raise ValueError(
                "autocast is set with dtype bfloat16, which leaves nothing to cast. Drop one of "
                "them"
            )
        if self.attention == "flash" and self.dtype == "float32" and not self.autocast:
            raise ValueError(
                "attention is flash with dtype float32, which it cannot compute in. Use dtype "
                "bfloat16 with lora, or add autocast"
            )
        return self


class CheckConfig(Section):
    """``realign check``: find every bad row of a dataset before any GPU time is spent."""

    data: Path
    """Dataset: parquet file, folder of ``realign build``, or JSON."""
    images: Path | None = None
    """Image folder; required for JSON."""
    model: str | None = None
    """Also check chat template, special tokens and lengths for this model, and predict its memory:
    folder or hub id. No weights are loaded except those of an adapter.
    """
    eval_images: Path | None = None
    """Folder of an evaluation's images. Rows with one of them are rejected, rows with a similar one
    are reported.
    """
    out: Path | None = None
    """Folder for problems.json (everything that was found) and rejected.jsonl (one rejected row per
    line).
    """
    max_reject: Share = 0.0
    """Largest share of rejected rows, such as 0.001 or 0.1%; with more the exit code is 1."""
    max_hamming: Annotated[HammingDistance | None, Shown("Limits")] = NEAR_DUPLICATE_BITS
    """A retrieved image whose perceptual hash differs from the original's in at most this many of
    64 bits counts as a copy; null allows copies.
    """
    max_length: PositiveInt | None = None
    """Longest row in tokens, image tokens included; the model's max_position_embeddings always
    applies too.
    """
    image_seconds: PositiveFloat = 10.0
    """Longest CPU time to decode one image, in seconds. Reading and decoding may together take ten
    times as long.
    """
    workers: NonNegativeInt = 0
    """Processes that decode images; 0 is one per core."""
    show: NonNegativeInt = 5
    """Rows to print for each kind of problem; problems.json has all of them."""
    lora: Annotated[LoraSection, Shown("Predicted memory")] = LoraSection()
    """Adapter to predict the memory of; by default the paper's."""
    freeze_vision: bool = True
    """Predict the memory of a run that does not train the vision tower."""


class EvalConfig(Section):
    """``realign eval``: ask several models the same questions, score their answers and compare them
    in pairs.
    """

    models: Annotated[dict[str, str], Shown(flag="model", metavar="NAME=FOLDER")]
    """Name and folder (or hub id) of a model or adapter. The others are compared with the first."""
    data: Path
    """Folder with the files of at least one benchmark, or with folders that are named after
    benchmarks; docs/guides/evaluation.md lists them."""
    images: Path | None = None
    """Folder of the questions' images, or with folders that are named after benchmarks; by default
    data."""
    benchmarks: Annotated[list[str], Shown(flag="benchmark", metavar="NAME")] = Field(
        default_factory=list
    )
    """A benchmark to ask; repeatable. By default every benchmark whose files are in ``data``."""
    out: Path
    """Output folder, for answers/NAME.jsonl and scores.json."""
    prompt: Literal["official", "llava", "lmms-eval", "vlmevalkit"] | None = None
    """Origin of the prompts; by default the one that docs/guides/evaluation.md names for each
    benchmark."""
    batch_size: Annotated[PositiveInt, Shown("Generation and scoring")] = 64
    """Rows per generation call."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens; by default the limit published with the benchmark's prompt."""
    allow_unchanged_adapter: bool = False
    """Continue with an adapter that does not change the logits of its base."""
    bootstrap: PositiveInt = 10_000
    """Draws of the bootstrap behind each interval, and of the permutation tests."""
    dtype: Dtype = "auto"
    """Dtype of the weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    seed: Seed = 0
    """Seed of the bootstrap and of the permutation tests."""


SECTIONS: Mapping[str, type[Section]] = {
    "build": BuildConfig,
    "cache": CacheConfig,
    "train": TrainConfig,
    "check": CheckConfig,
    "eval": EvalConfig,
}
