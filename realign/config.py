"""What a run is told: a section a verb. :mod:`realign.config_file` reads them.

Functions take these objects at the edge only; what computes gets plain arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    model_validator,
)

Dtype = Literal["auto", "float32", "bfloat16"]
RejectedScoring = Literal["label", "top_non_label"]
# resized and recompressed copies are within 6 of 64 bits, see realign/data/perceptual_hash.py
NEAR_DUPLICATE_BITS = 6


def _of_percent(value: Any) -> Any:
    """0.1% is 0.001; anything else is left to pydantic."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Share = Annotated[float, BeforeValidator(_of_percent), Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's, the narrowest
LearningRate = Annotated[float, Field(gt=0, le=1)]
HammingDistance = Annotated[int, Field(ge=0, le=63)]  # of 64 bits; 64 would be any two images


class Section(BaseModel):
    """The options of one verb, or of a part of one; each has its meaning below it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class GeneratorSection(Section):
    """A model that is asked: in this process, or behind an OpenAI-compatible server."""

    model: str
    """A folder or hub id; with ``endpoint``, the model's name there."""
    endpoint: str | None = None
    """Base URL of the server, such as http://localhost:8000/v1; None loads the model here."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: PositiveInt = 8
    """Requests under way at once. Endpoint only, as what follows."""
    timeout_s: PositiveFloat = 120.0
    """Seconds until a request counts as failed."""
    max_retries: int = Field(default=6, ge=0, le=1000)
    """Further tries of a request after 429, 5xx, time-outs and broken connections."""
    temperature: NonNegativeFloat | None = 0.0
    """0 is greedy; null leaves it to the server, for models that take no other."""
    length_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """``max_tokens`` for servers older than 2025."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request that the server understands; no place for secrets."""

    @model_validator(mode="after")
    def _check_endpoint(self) -> GeneratorSection:
        extra = sorted(self.model_fields_set - {"model", "endpoint"})
        if self.endpoint is None and extra:
            raise ValueError(
                f"{', '.join(extra)} need an endpoint; a model in this process is greedy. Add "
                "endpoint, or drop them"
            )
        return self


class BuildConfig(Section):
    """``realign build``: images, prompts and answers in, a dual-preference dataset out."""

    source: Path
    """What to build from: JSONL of ``{"image", "prompt", "answer"}``, LLaVA-Instruct JSON, parquet
    with images, or a set that has text pairs already.
    """
    images: Path | None = None
    """Folder that the image names in ``source`` are relative to."""
    image_name: str = Field(default="{name}", pattern=r"\{name\}")
    """What the file of an image called ``{name}`` in the source is called in the folder, such as
    COCO_train2014_{name} for LLaVA-Instruct's images in COCO's train2014.
    """
    model: str
    """The VLM to be aligned: a folder, or a hub id."""
    out: Path
    """Output folder."""
    format: str | None = None
    """Name of the source's layout, see docs/formats.md, where it is not to be recognised."""
    turns: Literal["first", "last", "each"] = "first"
    """Which answers of a conversation become rows: the first, the last, or each with the turns
    before it.
    """
    max_reject: Share = 0.0
    """Share of source rows that may be bad; they are listed in rejected.jsonl. Above it the build
    is refused.
    """
    annotator: GeneratorSection | None = None
    """Who answers rows that have no answer."""
    annotation_prompt: str = Field(default="{instruction}", pattern=r"\{instruction\}")
    """What the annotator is asked; ``{instruction}`` stands for the row's own."""
    mask: Literal["rule", "model"] = "rule"
    """Who masks: a lexicon, or a model with the paper's prompt (falls back to the lexicon,
    counted).
    """
    mask_level: Literal["segment", "sentence"] = "segment"
    """What becomes one [MASK]: a visual phrase, or a sentence that has one."""
    mask_retries: int = Field(default=1, ge=0, le=3)
    """Further tries of a model whose mask changes other words."""
    masker: GeneratorSection | None = None
    """The model that masks; the one to be aligned by default."""
    lexicon: Path | None = None
    """Phrases that can be masked; the packaged English one by default."""
    mask_rates: dict[str, Share] = Field(default_factory=dict)
    """Share of segments to mask by lexicon category; 1, the paper's, where none is given. Rule
    masking only.
    """
    encoder: str = "model"
    """Whose image embeddings are compared: ``model``, the vision path of the VLM, or a CLIP or
    SigLIP model such as ``openai/clip-vit-large-patch14``, the paper's.
    """
    index: Literal["exact", "flat", "ivf", "hnsw"] = "exact"
    """How neighbours are found: exactly, in torch, or by FAISS."""
    top_k: PositiveInt = 10
    """How many nearest images may be tried."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Images less alike than this are not candidates."""
    max_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Images more alike than this are not candidates."""
    max_hamming: HammingDistance | None = NEAR_DUPLICATE_BITS
    """Images whose perceptual hashes differ in at most so many of 64 bits are near duplicates, no
    candidates for each other; null keeps them.
    """
    inducer: GeneratorSection | None = None
    """Where the model to be aligned is asked, if not in this process: its server."""
    similarity: str = "lexical"
    """``lexical``, or a sentence-transformers model such as
    ``sentence-transformers/all-mpnet-base-v2``.
    """
    threshold: float = Field(default=0.95, gt=0, le=1)
    """A completion is accepted below this similarity to the answer (tau of the paper)."""
    min_length_ratio: NonNegativeFloat = 1 / 3
    """A completion with fewer words than this share of the answer's is refused."""
    max_length_ratio: PositiveFloat = 3.0
    """A completion with more words than so many times the answer's is refused."""
    keep_unmasked: bool = False
    """Accept a completion only if it kept every word that was not masked."""
    batch_size: PositiveInt = 32
    """Rows in one generation call."""
    window: PositiveInt = 256
    """Rows, by place in the source, whose generation batches are formed together."""
    shard_size: PositiveInt = 256
    """Rows in one shard, rounded up to whole windows: what a killed run can lose a worker."""
    engine: Literal["process", "ray"] = "process"
    """Where the work is done: processes of this machine, or a Ray cluster. It does not change the
    result, nor do the number of workers and the size of a shard.
    """
    workers: PositiveInt | None = None
    """Processes; by default one a GPU, else as many as cores and memory allow."""
    threads: PositiveInt = 1
    """CPU threads a worker; another number can change a result's last bits."""
    max_new_tokens: PositiveInt = 512
    """Longest completion."""
    max_length: PositiveInt | None = None
    """Longest prompt in tokens, image tokens included; the model's max_position_embeddings by
    default. A row with a longer one is dropped and counted, and never given to the model.
    """
    dtype: Dtype = "auto"
    """``auto``: bfloat16 on a GPU, float32 on a CPU."""
    seed: Seed = 0
    """Of the masking draw; servers are sent it too."""

    @model_validator(mode="after")
    def _check_masker(self) -> BuildConfig:
        if self.masker is not None and self.mask == "rule":
            raise ValueError("masker is given while mask is rule. Add mask: model, or drop masker")
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
    """``realign cache``: log-probabilities of the reference model, once a row."""

    model: str
    """The reference: the model that training starts from."""
    data: Path
    """Dataset: parquet file, ``realign build`` folder, or the authors' JSON."""
    out: Path
    """Cache folder; several models can share it."""
    images: Path | None = None
    """Image folder of the authors' JSON."""
    cells: Literal[3, 4] = 3
    """chosen, text_rejected, image_rejected[, both_rejected, for the symmetric objective]."""
    rejected_scoring: RejectedScoring = "label"
    """``top_non_label`` is what the authors' code does, see docs/paper.md."""
    batch_size: PositiveInt = 8
    """Pairs in one forward."""
    shard_size: PositiveInt = 1024
    """Rows in one shard, rounded up to whole batches: what a killed run can lose."""
    max_length: PositiveInt | None = None
    """Longest row in tokens, image tokens included; a longer row is an error, never cut."""
    dtype: Dtype = "auto"
    """``auto``: bfloat16 on a GPU, float32 on a CPU."""
    shared_prefix: bool | None = None
    """Compute image and prompt once for both answers of a pair; null: where the model can. This
    and what follows must be as in training.
    """
    attention: Literal["sdpa", "flash"] = "sdpa"
    """``flash`` is flash-attention 2, which needs its package, a GPU and bfloat16."""
    liger: bool = False
    """Fused layers of liger-kernel; needs a GPU."""
    quantization: Literal["nf4"] | None = None
    """``nf4`` keeps the language model's weights in 4 bits; needs a GPU and bitsandbytes."""
    autocast: bool = False
    """Compute in bfloat16 with float32 weights."""


class LoraSection(Section):
    """Low-rank adapters (peft)."""

    r: PositiveInt = 128
    """Rank; the paper's."""
    alpha: PositiveInt = 256
    """Scaling numerator; the paper's."""
    targets: str | list[str] = "all-linear"
    """Names of layers, or all-linear as the paper; the authors' code uses q_proj, k_proj, v_proj,
    o_proj. Frozen parts get no adapter. A name that matches nothing is refused.
    """


class TrainConfig(Section):
    """``realign train``: rDPO on a dual-preference dataset.

    The paper's are the defaults of the objective, beta, learning rate, schedule, epochs and batch;
    the paper trains LoRA, here the weights train unless ``lora`` is set.
    """

    model: str
    """The VLM to align: a folder, or a hub id."""
    data: Path
    """Dataset: parquet file, ``realign build`` folder, or the authors' JSON."""
    out: Path
    """Run folder: metrics.jsonl, steps/, checkpoint/."""
    images: Path | None = None
    """Image folder of the authors' JSON."""
    cache: Path | None = None
    """Folder of ``realign cache``, as given or as printed; without it the references are computed
    into ``out/cache`` first.
    """
    accept_numerics: bool = False
    """Use a cache that differs in numerics alone (machine, versions, layout), or an imported one,
    if 64 of its rows computed here agree; accepted_numerics.json says how well.
    """
    objective: Literal["rdpo", "dpo", "mdpo", "symmetric", "sft"] = "rdpo"
    """What is optimised; ``sft`` is the likelihood of the chosen answers alone, for comparison."""
    beta: PositiveFloat = 0.1
    """Tie to the reference in the answer pair."""
    image_beta: PositiveFloat | None = None
    """Tie to the reference in the image pair; ``beta`` by default. Not with dpo and sft."""
    image_weight: NonNegativeFloat = 1.0
    """Weight of the image pair. Not with dpo and sft."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's mean negative log-likelihood; not in the paper."""
    rejected_scoring: RejectedScoring = "label"
    """``top_non_label`` is what the authors' code does, see docs/paper.md."""
    learning_rate: LearningRate = 1e-5
    """Peak learning rate."""
    projector_learning_rate: LearningRate | None = None
    """Peak of the projector, be it trained in full or by its adapter; ``learning_rate`` by
    default.
    """
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rates go on after the warm-up: to 0 at the last step, or as they are."""
    epochs: PositiveFloat = 1.0
    """Passes over the data."""
    batch_size: PositiveInt = 1
    """Pairs a device and micro-step."""
    accumulation: PositiveInt = 8
    """Micro-steps a step."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of steps with rising learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient clipping; 0 switches it off."""
    lora: LoraSection | None = None
    """Train adapters instead of the weights; the paper does, with rank 128 and alpha 256."""
    train_projector: bool = False
    """With lora, train the projector's own weights, in float32, instead of an adapter on it; they
    are saved with the adapter.
    """
    quantization: Literal["nf4"] | None = None
    """With lora, ``nf4`` keeps the language model's weights in 4 bits (QLoRA), for the references
    too; needs a GPU and bitsandbytes.
    """
    freeze_vision: bool = True
    """Leave the vision tower as it is."""
    freeze_projector: bool = False
    """Leave the projector between vision tower and language model as it is."""
    freeze_language: bool = False
    """Leave the language model and its head as they are."""
    gradient_checkpointing: bool = False
    """Trade a second forward for activation memory."""
    shared_prefix: bool | None = None
    """Compute image and prompt once for both answers of a pair; null: where the model can."""
    attention: Literal["sdpa", "flash"] = "sdpa"
    """``flash`` is flash-attention 2, which needs its package, a GPU and bfloat16."""
    liger: bool = False
    """Fused normalisation, rotary embedding and MLP of liger-kernel in the model's layers, for the
    references too; needs a GPU. Its losses are not used.
    """
    check_first_step: bool = True
    """Stop where the first loss is not that of a policy which is its own reference."""
    workers: NonNegativeInt = 0
    """Processes that prepare batches; 0 does it between the steps."""
    max_length: PositiveInt | None = None
    """Longest row in tokens, image tokens included; a longer row is an error, never cut."""
    dtype: Dtype = "auto"
    """Of the weights. ``auto``: bfloat16 on a GPU with lora, else float32: without lora, updates of
    1e-5 vanish in bfloat16. A given cache must have the same.
    """
    autocast: bool = False
    """Compute in bfloat16 while weights and optimizer stay float32; what full fine-tuning on a GPU
    wants. The references are computed so too.
    """
    logging_steps: PositiveInt = 10
    """Steps between lines of metrics.jsonl; the first and the last step are always there.
    """
    save_steps: PositiveInt = 100
    """Steps between checkpoints: what a killed run can lose."""
    seed: Seed = 0
    """Of the order of rows and of adapter initialisation."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers of transformers.Trainer; none by default."""

    @model_validator(mode="after")
    def _check_parts(self) -> TrainConfig:
        for option, is_set in (
            ("train_projector", self.train_projector),
            ("quantization", self.quantization is not None),
        ):
            if is_set and self.lora is None:
                raise ValueError(f"{option} is set without lora, which it is a part of. Add lora")
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
    """``realign check``: every bad row of a dataset, before any GPU time."""

    data: Path
    """Dataset: parquet file, ``realign build`` folder, or the authors' JSON."""
    images: Path | None = None
    """Image folder of the authors' JSON."""
    model: str | None = None
    """Also check template, special tokens and lengths for this model, and predict memory; only its
    configuration and processor are loaded.
    """
    eval_images: Path | None = None
    """Folder of an evaluation's images: a row that holds one of them is rejected, one that holds a
    lookalike is reported.
    """
    out: Path | None = None
    """Folder for problems.json, everything that was found, and rejected.jsonl, a rejected row a
    line.
    """
    max_reject: Share = 0.0
    """Share of rows that may be rejected, such as 0.001 or 0.1%; more, and the exit code is 1."""
    max_hamming: HammingDistance | None = NEAR_DUPLICATE_BITS
    """A retrieved image whose perceptual hash (64 bits) differs from the original's in at most so
    many bits is a copy of it; null to allow copies.
    """
    max_length: PositiveInt | None = None
    """Longest row in tokens, image tokens included; beside the model's max_position_embeddings."""
    lora: LoraSection = LoraSection()
    """Adapter whose memory is predicted; the paper's by default."""
    freeze_vision: bool = True
    """Whether the vision tower is left as it is, for the predicted memory."""
    workers: NonNegativeInt = 0
    """Processes that decode images; 0 for one a core."""
    image_seconds: PositiveFloat = 10.0
    """Longest time for decoding one image."""
    show: NonNegativeInt = 5
    """Rows to print of each kind of problem; all are in problems.json."""


class EvalConfig(Section):
    """``realign eval``: raw answers of several models to the same questions, scored and compared
    in pairs.
    """

    models: dict[str, str]
    """Name to model or adapter folder; the first is what the others are compared with."""
    data: Path
    """Folder with the files of at least one benchmark; docs/evaluation.md lists them."""
    images: Path
    """Image folder."""
    out: Path
    """Output folder: answers/NAME.jsonl, scores.json."""
    batch_size: PositiveInt = 64
    """Rows in one generation call."""
    max_new_tokens: PositiveInt = 128
    """Longest answer."""
    bootstrap: PositiveInt = 2000
    """Resamples of the images behind each interval."""
    dtype: Dtype = "auto"
    """``auto``: bfloat16 on a GPU, float32 on a CPU."""
    seed: Seed = 0
    """Of the bootstrap."""


SECTIONS: Mapping[str, type[Section]] = {
    "build": BuildConfig,
    "cache": CacheConfig,
    "train": TrainConfig,
    "check": CheckConfig,
    "eval": EvalConfig,
}
