"""Models of the stages of a build: loaded by each worker, or on a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from realign.building.masking.masker import Fits
from realign.config import BuildConfig, GeneratorSection
from realign.data.images import Size, image_size
from realign.errors import RefusedError
from realign.generation.generator import Generator
from realign.modeling.adapter_folder import check_adapter
from realign.modeling.folder import model_identity, resolve_model
from realign.modeling.lengths import ImageTokens, position_limit
from realign.modeling.loading import choose_dtype
from realign.modeling.model_config import load_model_config
from realign.modeling.processors import load_processor
from realign.modeling.vocabulary import Vocabulary

if TYPE_CHECKING:
    from realign.generation.endpoint import Endpoint


@dataclass(frozen=True)
class LocalModel:
    """A model that each worker loads, and its settings.

    Attributes:
        name: Name for the provenance of rows: a hub id, or the folder's name.
        folder: Folder of the model.
        dtype: Dtype of the weights.
        max_new_tokens: Longest answer in tokens.
        batch_size: Requests per call of the model.
        max_length: Longest prompt in tokens; None for the model's own limit.
    """

    name: str
    folder: Path
    dtype: torch.dtype
    max_new_tokens: int
    batch_size: int
    max_length: int | None

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that the answers depend on beside the configuration."""
        return {"model": model_identity(self.folder, generates=True), "dtype": str(self.dtype)}

    @property
    def provenance(self) -> dict[str, Any]:
        """Return the origin of answers, for ``meta``."""
        return {"engine": "transformers", "model": self.name, "decoding": "greedy"}

    @contextmanager
    def open(self) -> Iterator[tuple[Generator, Fits]]:
        """Load the model; yield a generator, and a function that checks the length of prompts."""
        from realign.generation.transformers_generator import TransformersGenerator

        generator = TransformersGenerator.load(
            self.folder, self.dtype, self.max_new_tokens, self.batch_size
        )
        limit = self.max_length or position_limit(generator.model.config)
        yield generator, PromptLength(generator.processor, limit).fits


@dataclass(frozen=True)
class ServedModel:
    """A model on an OpenAI-compatible server.

    Attributes:
        section: Options of the server and the model.
        role: Name of that section in the configuration, for messages.
        journal: File that keeps every answer.
        max_new_tokens: Longest answer in tokens.
        seed: Seed that is sent with every request.
    """

    section: GeneratorSection
    role: str
    journal: Path
    max_new_tokens: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the model on the server."""
        return self.section.model

    @property
    def address(self) -> tuple[str, str, str]:
        """Return the options that a check of the server depends on."""
        return str(self.section.endpoint), self.section.api_key_env, self.section.model

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that is known about what the answers depend on."""
        without_effect = {"endpoint", "concurrency", "timeout_s", "max_retries", "api_key_env"}
        return self.section.model_dump(mode="json", exclude=without_effect)

    @property
    def provenance(self) -> dict[str, Any]:
        """Return the origin of answers, for ``meta``."""
        temperature = self.section.temperature
        decoding = "greedy" if temperature == 0 else f"temperature {temperature}"
        origin = {"engine": "endpoint", "model": self.section.model, "decoding": decoding}
        return origin | {"seed": self.seed}

    @contextmanager
    def open(self) -> Iterator[tuple[Generator, Fits]]:
        """Open the journal; yield a generator. The server decides which prompts are too long."""
        from realign.generation.endpoint_generator import EndpointGenerator, Sampling

        section = self.section
        sampling = Sampling(
            section.model,
            self.max_new_tokens,
            section.temperature,
            self.seed,
            section.length_field,
            section.extra_body,
        )
        with EndpointGenerator(self._endpoint(), sampling, self.journal) as generator:
            yield generator, lambda prompt, image: True

    def check(self) -> None:
        """Check the options without contacting the server.

        Raises:
            RefusedError: The client is not installed, the URL or the key is unusable, or a required
                key is not set.
        """
        endpoint = self._endpoint()
        from realign.generation.endpoint_probe import check_key

        check_key(endpoint, is_named="api_key_env" in self.section.model_fields_set)

    def check_server(self) -> None:
        """Check that the server can be used.

        Raises:
            RefusedError: The server cannot be reached, refuses the key, or does not serve the
                model.
        """
        endpoint = self._endpoint()
        from realign.generation.endpoint_probe import check_server

        check_server(endpoint, self.section.model, self.section.length_field)

    def _endpoint(self) -> Endpoint:
        from realign.generation.endpoint import Endpoint

        section = self.section
        assert section.endpoint is not None
        return Endpoint(
            section.endpoint,
            section.api_key_env,
            section.concurrency,
            section.timeout_s,
            section.max_retries,
            option=f"build.{self.role}.endpoint",
        )


Asked = LocalModel | ServedModel


def asked_model(section: GeneratorSection | None, role: str, config: BuildConfig) -> Asked:
    """Return the model of a role: the one of its section, or the model to be aligned.

    Args:
        section: ``annotator``, ``masker`` or ``inducer`` of ``config``.
        role: Name of the section, for the journal and for messages.
        config: The build.
    Raises:
        RefusedError: There is no such model, or the options of a server cannot be used.
    """
    if section is not None and section.endpoint is not None:
        return _served(section, role, config)
    model, option = (
        (section.model, f"set build.{role}.model") if section else (config.model, "model")
    )
    folder = resolve_model(model, option)
    check_adapter(folder)
    return LocalModel(
        folder.name if Path(model).is_dir() else model,
        folder,
        choose_dtype(config.dtype),
        config.max_new_tokens,
        config.batch_size,
        config.max_length,
    )


def check_sections(config: BuildConfig) -> None:
    """Refuse addresses and keys that are known to fail, before a model is downloaded."""
    for role in ("annotator", "masker", "inducer"):
        section = getattr(config, role)
        if section is not None and section.endpoint is not None:
            _served(section, role, config)


def _served(section: GeneratorSection, role: str, config: BuildConfig) -> ServedModel:
    journal = config.out / "journal" / f"{role}.jsonl"
    served = ServedModel(section, role, journal, config.max_new_tokens, config.seed)
    served.check()
    return served


class PromptLength:
    """Lengths of prompts in the tokens that a generator reads.

    Args:
        processor: The model's processor.
        limit: Longest prompt in tokens, image tokens included; None for no limit.
    """

    def __init__(self, processor: Any, limit: int | None) -> None:
        self.processor, self.limit = processor, limit
        self._image_tokens = ImageTokens(processor)
        self._sizes: dict[Path, tuple[int, int]] = {}
        # the last prompt and its tokens, since it is asked about several images in a row
        self._last: tuple[str | None, int] = (None, 0)

    def fits(self, prompt: str, image: Path) -> bool:
        """Return whether the prompt about the image is within the limit."""
        return self.limit is None or self.tokens(prompt, image) <= self.limit

    def tokens(self, prompt: str, image: Path) -> int:
        """Return the number of tokens that the model would read."""
        size = self._sizes.get(image) or self._sizes.setdefault(image, image_size(image))
        if prompt != self._last[0]:
            self._last = (prompt, len(self._image_tokens.prompt_ids(prompt)))
        return self._last[1] + self._image_tokens(size)


class Readers:
    """Checks whether the models of a build can read texts and images, before any is loaded.

    Args:
        folders: Folders of the vision-language models.
        encoders: Image processors of models that read images alone.
    """

    def __init__(self, folders: Iterable[Path], encoders: Iterable[Any] = ()) -> None:
        self._models = []
        self._encoders = [*encoders]
        for folder in dict.fromkeys(folders):
            processor = load_processor(folder)
            vocabulary = Vocabulary(processor, load_model_config(folder))
            self._models.append((ImageTokens(processor, vocabulary), vocabulary))

    def refusal_of_image(self, size: Size) -> RefusedError | None:
        """Return why a model cannot read an image of that size, or None."""
        for reader, _ in self._models:
            try:
                reader(size)
            except RefusedError as error:
                return error
        for images in self._encoders:
            try:
                images(images=[Image.new("RGB", size)], return_tensors="pt")
            except Exception as error:  # processors refuse images with many kinds of exceptions
                return RefusedError(
                    f"image of {size[0]} x {size[1]} pixels must be what {type(images).__name__} "
                    f"takes, got {type(error).__name__}: {error}. Replace it or remove the row.",
                    code="processor",
                )
        return None

    def refusal_of_text(self, text: str) -> str:
        """Return a message on the first token that a model does not have, or an empty text."""
        for reader, vocabulary in self._models:
            # most tokenizers have no surplus tokens, which saves tokenizing the source
            if vocabulary.surplus() and (
                message := vocabulary.problem("text", reader.prompt_ids(text))
            ):
                return message
        return ""
