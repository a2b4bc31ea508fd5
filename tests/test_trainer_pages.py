"""The pages on other trainers are true: their Python runs, and every message that they explain is
what a call raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import realign_kernels
from realign_kernels import (
    Objective,
    Term,
    linear_logprob,
    preference_loss,
    rdpo_loss,
    shift_labels,
    stack_cells,
)

PAGES = Path(__file__).parents[1] / "docs" / "guides" / "trainers"
C, P, T, D, V = 3, 4, 6, 64, 1000


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def names() -> dict[str, Any]:
    """Return the names that the pages use: six vectors in float64, and a model without a head."""
    generator = torch.Generator().manual_seed(0)
    vectors = (3 * torch.randn(6, P, generator=generator).double() - 20).unbind()
    states = torch.randn(C * P, T, D, generator=generator, requires_grad=True)
    head = SimpleNamespace(weight=torch.randn(V, D, generator=generator))

    def body(**inputs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=states)

    cells = ("chosen", "rejected", "image_rejected")
    return {
        **{name: getattr(realign_kernels, name) for name in realign_kernels.__all__},
        **dict(zip((*cells, *(f"ref_{cell}" for cell in cells)), vectors, strict=True)),
        "imageless": vectors[2],
        "ref_imageless": vectors[5],
        "beta": 0.1,
        "torch": torch,
        "F": F,
        "model": SimpleNamespace(model=body, lm_head=head),
        "inputs": {},
        "labels": torch.randint(V, (C * P, T), generator=generator),
        "ref_logps": torch.zeros(C, P),
        "states": states,
    }


@pytest.mark.parametrize("page", ["README.md", "ms-swift.md", "llama-factory.md"])
def test_python_blocks_run(page: str, names: dict[str, Any]) -> None:
    states = names["states"]
    assert blocks(page)
    for block in blocks(page):
        exec(block, names)
    expected = torch.zeros(P).double()
    for cell in ("rejected", "image_rejected"):
        contrast = names["chosen"] - names[cell] - (names["ref_chosen"] - names[f"ref_{cell}"])
        expected -= F.logsigmoid(0.1 * contrast)
    if page == "README.md":
        torch.testing.assert_close(names["loss"], expected.mean())
        assert states.grad.abs().sum() > 0
    else:
        torch.testing.assert_close(names["losses"], expected)


def test_the_authors_formulas_equal_ours(names: dict[str, Any]) -> None:
    mdpo, rdpo, own_trainer = blocks("authors-code.md")
    for block, shares in ((mdpo, 3), (rdpo, 2)):
        exec(block, names)
        torch.testing.assert_close(names["output"].losses, names["theirs"], rtol=1e-14, atol=0)
        rewards = 0.1 * (names["logps"] - names["ref_logps"])
        torch.testing.assert_close(names["output"].rewards, rewards)
        assert names["theirs"].shape == (P,)
        assert len(names["output"].rewards) == 3
        assert shares == block.count("F.logsigmoid")
    exec(own_trainer, names)
    exec(mdpo, names)
    trainer = SimpleNamespace(beta=0.1)
    vectors = (*names["logps"], *names["ref_logps"])
    losses, *rewards = names["dpo_loss"](trainer, *vectors)
    assert torch.equal(losses, names["output"].losses)
    assert torch.equal(torch.stack(rewards), names["output"].rewards)
    free, *_ = names["dpo_loss"](trainer, *vectors, reference_free=True)
    zeros = torch.zeros(3, P).double()
    assert torch.equal(free, names["dpo_loss"](trainer, *names["logps"], *zeros)[0])


H = torch.zeros(C * P, T, D)
W = torch.zeros(V, D)
Y = torch.zeros(C * P, T).long()
R = torch.zeros(C, P)


def masked() -> torch.Tensor:
    labels = Y.clone()
    labels[3] = -100
    return labels


def differentiate_twice() -> None:
    hidden_states = H.clone().requires_grad_()
    total = linear_logprob(hidden_states, W, Y).sum()
    (grad,) = torch.autograd.grad(total, hidden_states, create_graph=True)
    grad.sum().backward()


# One call a row of the table, in its order.
CALLS: list[Callable[[], Any]] = [
    lambda: rdpo_loss(H[:8], W, Y[:8], R[:2]),
    lambda: rdpo_loss(H[:4], W, Y[:4], None),
    lambda: rdpo_loss(H[:8], W, Y[:8], (R[0], R[1])),  # type: ignore[arg-type]
    lambda: rdpo_loss(H, W, Y, torch.zeros(16, 3)),
    lambda: rdpo_loss(H, W, Y, R, objective="dpo"),  # type: ignore[arg-type]
    lambda: rdpo_loss(H, torch.nn.Linear(D, V), Y, R),  # type: ignore[arg-type]
    lambda: rdpo_loss(H @ W.T, W, Y, R),
    lambda: rdpo_loss(W, H, Y, R),
    lambda: rdpo_loss(H, W, Y, torch.zeros(C * P, T)),
    lambda: rdpo_loss(H[:, :-1], W, Y, R),
    lambda: shift_labels(masked()),
    lambda: stack_cells(R[0], R[1, :3], R[2]),
    lambda: stack_cells(Y[:P], torch.zeros(P, T + 1).long()),
    lambda: rdpo_loss(H, W, Y.int(), R),
    lambda: rdpo_loss(H, W, Y + V, R),
    lambda: preference_loss(R.bfloat16(), R, Objective.rdpo()),
    lambda: rdpo_loss(H, W, masked(), R),
    lambda: preference_loss(R, R, Objective((Term((1, -1), link="ipo"),))),
    lambda: rdpo_loss(H, torch.empty(0), Y, R),
    lambda: torch.func.grad(lambda h: rdpo_loss(h, W, Y, R).loss)(H),
    differentiate_twice,
]


def test_every_documented_message_is_raised() -> None:
    page = (PAGES / "README.md").read_text("utf-8")
    table = page.split("## Error messages")[1].split("The messages of other trainers")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(messages) == len(CALLS)
    for message, call in zip(messages, CALLS, strict=True):
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as raised:
            call()
        text = str(raised.value)
        for part in message.split(" ... "):
            assert part.removesuffix(" ...") in text, (part, text)


def test_linked_files_exist() -> None:
    pages = {page.name: page.read_text("utf-8") for page in PAGES.glob("*.md")}
    assert pages.keys() >= {"README.md", "ms-swift.md", "llama-factory.md", "authors-code.md"}
    for name, text in pages.items():
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            linked = PAGES / (target or name)
            assert linked.exists(), (name, target)
            if heading:
                headings = re.findall(r"^#+ (.*)", linked.read_text("utf-8"), re.MULTILINE)
                words = [re.sub(r"[^\w -]", "", title).lower() for title in headings]
                assert heading.replace("-", " ") in words, (name, target, heading)
