"""Preference objectives as tables of terms, and the loss that reads them.

A pair has up to four cells, in this order everywhere: ``chosen`` (y_w, original image),
``text_rejected`` (y_l, original), ``image_rejected`` (y_w, retrieved image), ``both_rejected``
(y_l, retrieved).  Letters: **P** pairs, **C** cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels.validation import (
    check_cell_shape,
    check_choice,
    check_chosen_present,
    check_floating,
    check_no_tangent,
    check_number,
    check_tensor,
    describe,
    is_number,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_CELLS = 4
NORMALIZATIONS = ("none", "length")
_TEXT = (1.0, -1.0, 0.0, 0.0)
_IMAGE = (1.0, 0.0, -1.0, 0.0)
_ANCHOR = (1.0, 0.0, 0.0, 0.0)
_RETRIEVED_TEXT = (0.0, 0.0, -1.0, 1.0)
_REJECTED_IMAGE = (0.0, -1.0, 0.0, 1.0)
# The cells of a preference pair, in their order.
CELL_NAMES = ("chosen", "text_rejected", "image_rejected", "both_rejected")


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of an objective: ``weight * link(beta * (coefficients . rho) - offset)``.

    Example::

        >>> from realign_kernels import Term
        >>> Term((1, -1), beta=0.2).coefficients  # chosen minus text_rejected
        (1.0, -1.0, 0.0, 0.0)
    """

    coefficients: tuple[float, ...]
    """Factor of each cell's log-ratio; padded with zeros to four."""
    weight: float = 1.0
    """Factor of the term; >= 0."""
    beta: float = 0.1
    """KL strength of the term; > 0."""
    offset: float = 0.0
    """Margin that must be exceeded; 0 for hinge and ipo."""
    link: str = "logsigmoid"
    """A key of ``LINKS``: logsigmoid, hinge or ipo."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences, in [0, 0.5); 0 for hinge and ipo."""
    normalize: str = "none"
    """``"length"`` divides each cell's log-ratio by its answer tokens, as ipo always does."""

    def __post_init__(self) -> None:
        is_sequence = hasattr(self.coefficients, "__iter__") and not isinstance(
            self.coefficients, str | dict | Tensor
        )
        coefficients = tuple(self.coefficients) if is_sequence else ()
        if not is_sequence or not all(map(is_number, coefficients)):
            raise TypeError(
                f"coefficients must be numbers, one per cell, got {describe(self.coefficients)}. "
                "Pass a tuple such as (1, -1)."
            )
        coefficients = tuple(float(coefficient) for coefficient in coefficients)
        if not (
            1 <= len(coefficients) <= MAX_CELLS
            and any(coefficients)
            # torch.compile does not trace math.isfinite for a number that changes.
            and all(-math.inf < coefficient < math.inf for coefficient in coefficients)
        ):
            raise ValueError(
                f"coefficients must be 1 to {MAX_CELLS} finite numbers that are not all 0, "
                f"got {self.coefficients}. Chosen minus rejected is (1, -1)."
            )
        object.__setattr__(
            self, "coefficients", coefficients + (0.0,) * (MAX_CELLS - len(coefficients))
        )
        check_number("weight", self.weight, least=0.0)
        check_number("beta", self.beta, above=0.0)
        check_number("offset", self.offset)
        check_number("label_smoothing", self.label_smoothing)
        check_choice("link", self.link, sorted(LINKS))
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}. Pass 0."
            )
        if self.link != "logsigmoid":
            for name in ("offset", "label_smoothing"):
                if getattr(self, name) != 0:
                    raise ValueError(
                        f"{name} must be 0 for link {self.link!r}, got {getattr(self, name)}. "
                        "Leave it out, or take link 'logsigmoid'."
                    )

    @property
    def cells(self) -> tuple[int, ...]:
        """Indices of the cells that the term reads."""
        return tuple(cell for cell, coefficient in enumerate(self.coefficients) if coefficient != 0)

    @property
    def is_per_token(self) -> bool:
        """Return whether log-ratios are divided by the length of their answer."""
        return LINKS[self.link].is_per_token or self.normalize == "length"

    def contrast(self, log_ratios: Tensor, num_tokens: Tensor | None) -> Tensor:
        """Return ``coefficients . log_ratios``, (P,), without reading cells of coefficient 0."""
        if self.is_per_token:
            assert num_tokens is not None  # checked by preference_loss
            log_ratios = log_ratios / num_tokens.clamp(min=1)
        parts = [self.coefficients[cell] * log_ratios[cell] for cell in self.cells]
        return torch.stack(parts).sum(dim=0)

    def is_readable(self, is_present: Tensor) -> Tensor:
        """Return whether every cell that the term reads is present, (P,)."""
        # Indexing with a list of cells would copy it to the device on every call.
        return torch.stack([is_present[cell] for cell in self.cells]).all(dim=0)


class Link(NamedTuple):
    """A loss as a function of a term's contrast, and its derivative."""

    losses: Callable[[Term, Tensor], Tensor]
    slopes: Callable[[Term, Tensor], Tensor]
    is_per_token: bool = False


def _logsigmoid_losses(term: Term, contrast: Tensor) -> Tensor:
    x = term.beta * contrast - term.offset
    if term.label_smoothing == 0:
        # Skipped, since 0 * logsigmoid(-x) is NaN where x is inf.
        return -F.logsigmoid(x)
    return -(1 - term.label_smoothing) * F.logsigmoid(x) - term.label_smoothing * F.logsigmoid(-x)


def _logsigmoid_slopes(term: Term, contrast: Tensor) -> Tensor:
    x, smoothing = term.beta * contrast - term.offset, term.label_smoothing
    return term.beta * (smoothing * torch.sigmoid(x) - (1 - smoothing) * torch.sigmoid(-x))


def _hinge_losses(term: Term, contrast: Tensor) -> Tensor:
    return torch.relu(1 - term.beta * contrast)


def _hinge_slopes(term: Term, contrast: Tensor) -> Tensor:
    # A NaN has the slope that relu gives it.
    return -term.beta * (~(1 - term.beta * contrast <= 0)).to(contrast.dtype)


def _ipo_losses(term: Term, contrast: Tensor) -> Tensor:
    return (contrast - 1 / (2 * term.beta)).square()


def _ipo_slopes(term: Term, contrast: Tensor) -> Tensor:
    return 2 * (contrast - 1 / (2 * term.beta))


# Links by name.  Kernels know a link by its index in this order.
LINKS = {
    "logsigmoid": Link(_logsigmoid_losses, _logsigmoid_slopes),
    "hinge": Link(_hinge_losses, _hinge_slopes),
    "ipo": Link(_ipo_losses, _ipo_slopes, is_per_token=True),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """A sum of terms, plus ``nll_weight`` times the chosen answer's mean negative log-prob.

    Example::

        >>> from realign_kernels import Objective, Term
        >>> Objective.rdpo(beta=0.1).num_cells
        3
        >>> simpo = Objective((Term((1, -1), beta=2.0, offset=1.0, normalize="length"),))
        >>> simpo.needs_num_tokens
        True
    """

    terms: tuple[Term, ...]
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple | list):
            raise TypeError(
                f"terms must be a tuple of Term objects, got {describe(self.terms)}. "
                "Pass (term,) for a single one."
            )
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError("terms must hold at least one Term, got none. Pass Term((1, -1)).")
        for term in self.terms:
            if not isinstance(term, Term):
                raise TypeError(f"terms must be Term objects, got {describe(term)}. Call Term.")
        check_number("nll_weight", self.nll_weight, least=0.0)

    @classmethod
    def dpo(cls, beta: float = 0.1) -> Objective:
        """Prefer the better answer to the worse one (two cells).

        Example::

            >>> from realign_kernels import Objective
            >>> Objective.dpo(beta=0.2).num_cells
            2
        """
        return cls((Term(_TEXT, beta=beta),))

    @classmethod
    def rdpo(
        cls, beta: float = 0.1, image_beta: float | None = None, image_weight: float = 1.0
    ) -> Objective:
        """Prefer the better answer, and the right image to the retrieved one (three cells).

        Example::

            >>> from realign_kernels import Objective
            >>> Objective.rdpo(beta=0.1, image_beta=0.2).image_beta
            0.2
        """
        image_beta = _checked_image_beta(beta, image_beta, image_weight)
        return cls((Term(_TEXT, beta=beta), Term(_IMAGE, weight=image_weight, beta=image_beta)))

    @classmethod
    def mdpo(
        cls,
        beta: float = 0.1,
        image_beta: float | None = None,
        image_weight: float = 1.0,
        anchor_weight: float = 1.0,
        anchor_offset: float = 0.0,
    ) -> Objective:
        """Add an anchor to rDPO that keeps the chosen answer likelier than under the reference
        (three cells).

        Example::

            >>> from realign_kernels import Objective
            >>> Objective.mdpo(anchor_weight=0.5).terms[2].weight
            0.5
        """
        check_number("anchor_weight", anchor_weight, least=0.0)
        check_number("anchor_offset", anchor_offset)
        anchor = Term(_ANCHOR, weight=anchor_weight, beta=beta, offset=anchor_offset)
        return cls((*cls.rdpo(beta, image_beta, image_weight).terms, anchor))

    @classmethod
    def symmetric(
        cls, beta: float = 0.1, image_beta: float | None = None, image_weight: float = 1.0
    ) -> Objective:
        """Apply rDPO both ways, so that each answer prefers the image it describes (four cells).

        Example::

            >>> from realign_kernels import Objective
            >>> Objective.symmetric().num_cells
            4
        """
        image_beta = _checked_image_beta(beta, image_beta, image_weight)
        return cls(
            (
                Term(_TEXT, beta=beta),
                Term(_RETRIEVED_TEXT, beta=beta),
                Term(_IMAGE, weight=image_weight, beta=image_beta),
                Term(_REJECTED_IMAGE, weight=image_weight, beta=image_beta),
            )
        )

    def table(self) -> list[list[float]]:
        """Return the terms as rows of numbers, for kernels: four coefficients, weight, beta,
        offset, label smoothing, and a code of the link.

        The code is the link's index in ``LINKS``, plus ``len(LINKS)`` with ``normalize="length"``.
        Codes from that of ipo on are per token.
        """
        links = list(LINKS)
        return [
            [*term.coefficients, term.weight, term.beta, term.offset, term.label_smoothing,
             float(links.index(term.link) + len(links) * (term.normalize == "length"))]
            for term in self.terms
        ]  # fmt: skip

    @classmethod
    def from_table(cls, table: list[list[float]], nll_weight: float) -> Objective:
        """Return the objective of a :meth:`table`."""
        links = list(LINKS)
        terms = []
        for row in table:
            code = int(row[8])
            term = Term(tuple(row[:4]), row[4], row[5], row[6], links[code % len(links)], row[7])
            if code >= len(links):
                term = replace(term, normalize="length")
            terms.append(term)
        return cls(tuple(terms), nll_weight)

    @property
    def num_cells(self) -> int:
        """The number of cells that a batch must have at least: 2, 3 or 4."""
        return max(2, *(cell + 1 for term in self.terms for cell in term.cells))

    @property
    def beta(self) -> float:
        """KL strength of rewards and text margins: the text term's, or else the first term's."""
        return next(
            (term.beta for term in self.terms if term.coefficients == _TEXT), self.terms[0].beta
        )

    @property
    def image_beta(self) -> float:
        """KL strength of image margins: the image term's, or else ``beta``."""
        return next((term.beta for term in self.terms if term.coefficients == _IMAGE), self.beta)

    @property
    def needs_num_tokens(self) -> bool:
        """Return whether answer lengths enter the loss."""
        return self.nll_weight > 0 or any(term.is_per_token for term in self.terms)


class PreferenceOutput(NamedTuple):
    """Results of :func:`preference_loss`; only the first two carry gradients."""

    loss: Tensor
    """Mean of ``losses``, (); 0 without pairs."""
    losses: Tensor
    """Loss of each pair, (P,)."""
    rewards: Tensor
    """``beta * (logps - ref_logps)``, (C, P); 0 for absent cells."""
    text_margins: Tensor
    """``beta * (rho[0] - rho[1])``, (P,); 0 where a cell is absent."""
    image_margins: Tensor
    """``image_beta * (rho[0] - rho[2])``, (P,); 0 where a cell is absent, and for two cells."""


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    objective: Objective,
    *,
    num_tokens: Tensor | None = None,
) -> PreferenceOutput:
    """Return the loss of a batch of pairs under any objective, from summed log-probabilities.

    With ``rho = logps - ref_logps``, ``losses`` is the sum over terms of ``weight * link(beta *
    (coefficients . rho) - offset)``, minus ``nll_weight * logps[0] / num_tokens[0]``.  Links:
    logsigmoid ``-(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x)``, hinge ``relu(1 - x)``, ipo
    ``(coefficients . (rho / num_tokens) - 1 / (2 * beta)) ** 2``.  With ``normalize="length"`` a
    term of another link reads ``rho / num_tokens`` too.  SimPO, without a reference, is
    ``Objective((Term((1, -1), beta=2.0, offset=1.0, normalize="length"),))``.

    Args:
        logps: Summed answer log-probabilities, shape ``(C, P)``, float32 or float64; C from the
            objective's ``num_cells`` to 4 (cells that no term reads only enter ``rewards``).
        ref_logps: The reference model's sums, same shape, treated as constant; None is a reference
            of 0.
        objective: The table of terms.
        num_tokens: Number of answer tokens, shape ``(C, P)``; required by ipo,
            ``normalize="length"`` and ``nll_weight``.  A cell with 0 tokens is absent: its reward
            is 0 and every term that reads it adds 0 for that pair, while means stay over P.
    Returns:
        output: :class:`PreferenceOutput`, dtype of ``logps``.
    Raises:
        ValueError: Shapes disagree, there are too few cells, or ``num_tokens`` is missing or, on
            the host, 0 for a chosen answer.
        TypeError: A dtype cannot hold sums of log-probabilities.
        NotImplementedError: ``ref_logps`` carries a forward-mode tangent, which would be dropped.
    Note: deterministic; nothing waits for a GPU.
    Source: paper, eq. (1) -> docs/paper.md.

    Example::

        >>> import torch
        >>> from realign_kernels import Objective, preference_loss
        >>> logps = torch.tensor([[-4.0, -6.0], [-9.0, -6.0]])  # (C, P): chosen, then rejected
        >>> ref_logps = torch.tensor([[-5.0, -6.0], [-8.0, -6.0]])
        >>> output = preference_loss(logps, ref_logps, Objective.dpo(beta=0.1))
        >>> output.text_margins
        tensor([0.2000, 0.0000])
        >>> output.losses  # -logsigmoid of the margins
        tensor([0.5981, 0.6931])
    """
    check_cells(logps, ref_logps, objective, num_tokens)
    if num_tokens is not None and num_tokens.device.type == "cpu":
        check_chosen_present(num_tokens)
    return reduce_losses(logps, ref_logps, objective, num_tokens)


def reduce_losses(
    logps: Tensor, ref_logps: Tensor | None, objective: Objective, num_tokens: Tensor | None
) -> PreferenceOutput:
    """Compute :func:`preference_loss` for arguments that have been checked."""
    is_present = torch.ones_like(logps, dtype=torch.bool) if num_tokens is None else num_tokens > 0
    log_ratios = logps if ref_logps is None else logps - ref_logps.detach().to(logps.dtype)
    log_ratios = torch.where(is_present, log_ratios, 0.0)
    losses = torch.zeros_like(log_ratios[0])
    for term in objective.terms:
        term_losses = LINKS[term.link].losses(term, term.contrast(log_ratios, num_tokens))
        losses = losses + term.weight * torch.where(term.is_readable(is_present), term_losses, 0.0)
    if objective.nll_weight > 0 and num_tokens is not None:
        mean_nll = -logps[0] / num_tokens[0].clamp(min=1)
        losses = losses + objective.nll_weight * torch.where(is_present[0], mean_nll, 0.0)

    def margins(cell: int, beta: float) -> Tensor:
        margin = beta * (log_ratios[0] - log_ratios[cell])
        return torch.where(is_present[0] & is_present[cell], margin, 0.0).detach()

    return PreferenceOutput(
        # The mean of no losses would be NaN; a rank without pairs contributes 0.
        loss=losses.sum() / max(1, losses.numel()),
        losses=losses,
        rewards=(objective.beta * log_ratios).detach(),
        text_margins=margins(1, objective.beta),
        image_margins=margins(2, objective.image_beta)
        if len(logps) > 2
        else torch.zeros_like(losses).detach(),
    )


def differentiate_losses(log_ratios: Tensor, objective: Objective, num_tokens: Tensor) -> Tensor:
    """Return the derivative of the mean loss with respect to the summed log-probabilities, (C, P).

    It is for kernels, which run below autograd.  ``log_ratios`` are 0 in absent cells.
    """
    is_present, counts = num_tokens > 0, num_tokens.clamp(min=1).to(log_ratios.dtype)
    gradient = torch.zeros_like(log_ratios)
    for term in objective.terms:
        link = LINKS[term.link]
        slopes = term.weight * link.slopes(term, term.contrast(log_ratios, num_tokens))
        slopes = torch.where(term.is_readable(is_present), slopes, 0.0)
        for cell in term.cells:
            factor = slopes / counts[cell] if term.is_per_token else slopes
            gradient[cell] += term.coefficients[cell] * factor
    if objective.nll_weight > 0:
        gradient[0] -= torch.where(is_present[0], objective.nll_weight / counts[0], 0.0)
    return gradient / max(1, gradient.shape[1])


def _checked_image_beta(beta: float, image_beta: float | None, image_weight: float) -> float:
    """Check the numbers of an image term under the caller's names, and return its beta."""
    check_number("image_weight", image_weight, least=0.0)
    if image_beta is None:
        return beta
    check_number("image_beta", image_beta, above=0.0)
    return image_beta


def check_objective(objective: Objective, wanted: str) -> None:
    """Refuse anything but an objective, and say how to make one."""
    if isinstance(objective, Objective):
        return
    remedy = "Pass Objective.rdpo(), Objective.dpo() or another table of terms."
    if isinstance(objective, Term):
        remedy = "Pass Objective((term,))."
    raise TypeError(f"objective must be an {wanted}, got {describe(objective)}. {remedy}")


def check_cells(
    logps: Tensor, ref_logps: Tensor | None, objective: Objective, num_tokens: Tensor | None
) -> None:
    """Check types, shapes, dtypes and devices of a preference batch; no values."""
    check_objective(objective, "Objective")
    check_tensor("logps", logps)
    check_tensor("ref_logps", ref_logps, optional=True)
    check_tensor("num_tokens", num_tokens, optional=True)
    check_floating("logps", logps)
    check_cell_shape("logps", logps, objective.num_cells, MAX_CELLS)
    for name, other in (("ref_logps", ref_logps), ("num_tokens", num_tokens)):
        if other is not None and other.shape != logps.shape:
            looks_transposed = other.ndim == 2 and other.T.shape == logps.shape
            remedy = "It looks transposed: pass its .T." if looks_transposed else "Both are (C, P)."
            raise ValueError(
                f"{name} must have shape {tuple(logps.shape)} to match logps, "
                f"got {tuple(other.shape)}. {remedy}"
            )
    check_reference(ref_logps, logps, "logps")
    if num_tokens is not None:
        if num_tokens.dtype == torch.bool or num_tokens.is_complex():
            raise TypeError(
                f"num_tokens must hold counts, int64, got {num_tokens.dtype}. Sum the mask."
            )
        _check_device("num_tokens", num_tokens, logps, "logps")
    if num_tokens is None and objective.needs_num_tokens:
        raise ValueError(
            "num_tokens must be given for link 'ipo', normalize='length' and nll_weight, got None. "
            "Count the answer tokens of every cell and pair, (C, P)."
        )


def check_reference(ref_logps: Tensor | None, like: Tensor, name: str) -> None:
    """Check the dtype and device of a reference, which gets no gradient."""
    if ref_logps is None:
        return
    check_floating("ref_logps", ref_logps)
    check_no_tangent("ref_logps", ref_logps)
    _check_device("ref_logps", ref_logps, like, name)


def _check_device(name: str, tensor: Tensor, like: Tensor, other: str) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} to match {other}, got {tensor.device}. "
            f"Call .to({str(like.device)!r})."
        )
