"""A training loop of your own: rDPO in plain PyTorch, without a Trainer.

    python examples/own_loop.py

It trains the small model of the package on four drawn pairs, within seconds, on a CPU and without a
network. Replace the model's folder and `PAIRS` by your own.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign_kernels import linear_logprob, rdpo_loss, shift_labels

MODEL = str(files("realign") / "demo" / "model")
QUESTION = "Describe the image."
# The colour in the image, the true answer, the made-up answer, the colour in the retrieved image
PAIRS = [
    ("red", "There is a red cup.", "There is a red cup and a blue plate.", "green"),
    ("blue", "There is a blue boat.", "There is a blue fish.", "purple"),
    ("green", "There is a green tree.", "There is a green tree and a house.", "yellow"),
    ("black", "There is a black key.", "There is a black lock.", "blue"),
]


class RdpoModel(torch.nn.Module):
    """A language model whose forward returns the loss.

    DDP, FSDP and ZeRO gather weights and reduce gradients around the forward of the module that
    they wrap. The output projection must therefore be used inside this forward, not in the loop.
    """

    def __init__(self, model: Any, beta: float, image_weight: float) -> None:
        super().__init__()
        self.model, self.beta, self.image_weight = model, beta, image_weight

    def forward(self, inputs: dict[str, Tensor], labels: Tensor, ref_logps: Tensor | None) -> Any:
        # The model without its head: logits are neither computed here nor stored in rdpo_loss.
        hidden_states = self.model.model(**inputs, use_cache=False).last_hidden_state
        # The state at a position predicts the next token.
        weight, labels = self.model.lm_head.weight, shift_labels(labels)
        if ref_logps is None:
            return linear_logprob(hidden_states, weight, labels).sum(dim=1).view(3, -1)  # (3, P)
        return rdpo_loss(
            hidden_states, weight, labels, ref_logps, beta=self.beta, image_weight=self.image_weight
        )


def collate(processor: Any, pairs: list[tuple[str, str, str, str]]) -> tuple[Any, Tensor]:
    """Return the inputs of three sequences per pair, and labels with -100 outside of answers."""
    # Cell by cell: all chosen answers, all rejected ones, then the chosen ones with other images.
    cells = [
        *((draw(color), answer) for color, answer, _, _ in pairs),
        *((draw(color), rejected) for color, _, rejected, _ in pairs),
        *((draw(retrieved), answer) for _, answer, _, retrieved in pairs),
    ]
    images = [image for image, _ in cells]
    question = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": QUESTION}],
    }
    prompt = processor.apply_chat_template([question], add_generation_prompt=True)
    texts = [
        processor.apply_chat_template([question, {"role": "assistant", "content": answer}])
        for _, answer in cells
    ]
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    inputs = processor(images=images, text=texts, **options)
    # The processor adds image tokens to the prompt, so its length is counted afterwards.
    prompts = processor(images=images, text=[prompt] * len(images), **options)
    prompt_lengths = prompts["attention_mask"].sum(dim=1, keepdim=True)
    is_prompt = torch.arange(inputs["input_ids"].shape[1]) < prompt_lengths
    is_answer = ~is_prompt & (inputs["attention_mask"] == 1)
    return inputs, inputs["input_ids"].masked_fill(~is_answer, -100)


def draw(color: str) -> Image.Image:
    """Return the image of a disc on white."""
    image = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=color)
    return image


def main(steps: int = 10, beta: float = 0.1, image_weight: float = 1.0) -> list[float]:
    """Train on two pairs per step and return the losses."""
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(MODEL)
    model = RdpoModel(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32), beta, image_weight
    )
    batches = [collate(processor, PAIRS[:2]), collate(processor, PAIRS[2:])]
    # The reference is the model before training. It is computed once, and costs no memory later.
    with torch.no_grad():
        references = [model(inputs, labels, None) for inputs, labels in batches]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    losses = []
    for step in range(steps):
        (inputs, labels), ref_logps = batches[step % 2], references[step % 2]
        output = model(inputs, labels, ref_logps)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        # Both margins should grow, that of the answers and that of the images.
        margins = output.text_margins.mean().item(), output.image_margins.mean().item()
        print(f"step {step}  loss {losses[-1]:.4f}  margins {margins[0]:.3f}, {margins[1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
