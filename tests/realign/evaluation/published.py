"""A few rows of every benchmark in the form in which it is published, with drawn images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from realign.demo.drawing import draw
from realign.demo.world import free_scene

Files = Mapping[str, Any]  # path below the folder of data -> JSON value, lines, or text


def picture(seed: int) -> bytes:
    """Return a PNG file of the drawn world."""
    buffer = io.BytesIO()
    draw(free_scene(Random(seed))).save(buffer, "PNG")
    return buffer.getvalue()


def write_published(name: str, data: Path, images: Path) -> None:
    """Write the files of a benchmark, and below ``images`` those of its images that are files
    of their own.
    """
    files, names = PUBLISHED[name]()
    for path, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        if isinstance(content, list) and path.endswith(("jsonl", "pope_popular.json")):
            text = "".join(f"{json.dumps(row)}\n" for row in content)
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_text(text, encoding="utf-8")
    for seed, image in enumerate(names):
        (images / image).parent.mkdir(parents=True, exist_ok=True)
        (images / image).write_bytes(picture(seed))


def _pope() -> tuple[Files, list[str]]:
    names = ["COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"]
    rows = [
        {"question_id": n, "image": names[n % 2], "text": f"Is there a {kind} in the image?",
         "label": "yes" if n % 2 else "no"}
        for n, kind in enumerate(("ball", "cup", "star", "moon"), start=1)
    ]  # fmt: skip
    return {"coco_pope_popular.json": rows}, [f"pope/val2014/{name}" for name in names]


def _hallusionbench() -> tuple[Files, list[str]]:
    def row(visual_input: str, figure: str, question: str, text: str, truth: str) -> Any:
        name = None if visual_input == "0" else f"./VS/map/0_{figure}.png"
        return {
            "category": "VS", "subcategory": "map", "visual_input": visual_input, "set_id": "0",
            "figure_id": figure, "sample_note": "", "question_id": question, "question": text,
            "gt_answer_details": "", "gt_answer": truth, "filename": name,
        }  # fmt: skip

    texts = ("Is the ball left of the cup?", "Is the cup left of the ball?")
    rows = [
        row(visual_input, figure, str(number), text, str(int(number == int(figure == "2"))))
        for visual_input, figure in (("0", "0"), ("1", "1"), ("2", "2"))
        for number, text in enumerate(texts)
    ]
    folder = "hallusionbench/hallusion_bench/VS/map"
    return {"HallusionBench.json": rows}, [f"{folder}/0_1.png", f"{folder}/0_2.png"]


def _amber() -> tuple[Files, list[str]]:
    kinds = ("discriminative-attribute-state", "discriminative-hallucination", "relation")
    query = [
        {"id": number, "image": f"AMBER_{number}.jpg", "query": f"Is the ball number {number} red?"}
        for number in (1, 2, 3)
    ]
    annotations = [
        {"id": number, "type": kind, "truth": "no"} for number, kind in enumerate(kinds, start=1)
    ]
    files = {"query/query_discriminative.json": query, "annotations.json": annotations}
    return files, [f"amber/AMBER_{number}.jpg" for number in (1, 2, 3)]


def _amber_generative() -> tuple[Files, list[str]]:
    query = [
        {"id": number, "image": f"AMBER_{number}.jpg", "query": "Describe this image."}
        for number in (1, 2)
    ]
    annotations = [
        {"id": number, "type": "generative", "truth": ["ball", "cup"], "hallu": ["star"]}
        for number in (1, 2)
    ]
    files = {
        "query/query_generative.json": query, "annotations.json": annotations,
        "relation.json": {"ball": [], "cup": ["mug"], "star": []}, "safe_words.txt": "line\n",
    }  # fmt: skip
    return files, [f"amber/AMBER_{number}.jpg" for number in (1, 2)]


def _chair() -> tuple[Files, list[str]]:
    rows = [
        {"image": f"{n}.png", "text": "Describe the image.", "objects": ["ball"]} for n in (1, 2)
    ]
    files = {"chair.jsonl": rows, "chair_objects.json": {"ball": ["ball"], "cup": ["cup"]}}
    return files, ["1.png", "2.png"]


def _mme() -> tuple[Files, list[str]]:
    files = {
        f"{task}/questions_answers_YN/{number}.txt": (
            f"Is there {word} ball? Please answer yes or no.\tYes\n"
            f"Is there {word} cup? Please answer yes or no.\tNo\n"
        )
        for task, word in (("existence", "a"), ("count", "only one"))
        for number in ("0001", "0002")
    }
    names = [f"{task}/images/{n}.png" for task in ("existence", "count") for n in ("0001", "0002")]
    return files, names


def _mmbench() -> tuple[Files, list[str]]:
    header = ["index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "image"]
    lines = ["\t".join(header)]
    choices = ["a ball", "a cup", "a star"]
    for index, hint in ((7, "nan"), (8, "Look at the sky.")):
        encoded = base64.b64encode(picture(index)).decode()
        for turn in range(3):
            turned = choices[turn:] + choices[:turn]
            label = "ABC"[turned.index("a cup")]
            number = str(index + 1_000_000 * turn)
            kind = ["object_localization", "finegrained_perception"]
            image = encoded if turn < 2 else str(index)  # the index of the row that has it
            line = [number, "What is red?", hint, *turned, "nan", label, *kind, image]
            lines.append("\t".join(line))
    return {"mmbench_dev_20230712.tsv": "\n".join(lines)}, []


def _scienceqa() -> tuple[Files, list[str]]:
    def problem(image: str | None, hint: str, split: str = "test") -> Any:
        choices = ["a ball", "a cup"]
        return {"question": "What is it?", "choices": choices, "answer": 1, "hint": hint,
                "image": image, "split": split}  # fmt: skip

    problems = {
        "4": problem("image.png", ""),
        "5": problem(None, "It holds water."),
        "6": problem("image.png", "", "train"),
    }
    splits = {"test": ["4", "5"], "train": ["6"]}
    return {"problems.json": problems, "pid_splits.json": splits}, ["scienceqa/test/4/image.png"]


def _textvqa() -> tuple[Files, list[str]]:
    rows = [
        {"question": question, "image_id": image, "question_id": 34602 + number,
         "answers": ["nokia"] * 6 + ["Nokia phone"] * 4}
        for number, (image, question) in enumerate(
            (("0054c91397f2fe05", "What Brand is it?"), ("0054c91397f2fe05", "what is written?"))
        )
    ]  # fmt: skip
    ocr = [
        {"question_id": row["image_id"], "image": f"{row['image_id']}.jpg", "category": "default",
         "text": f"{row['question']}\nReference OCR token: NOKIA\nAnswer the question using a "
         "single word or phrase."}
        for row in rows
    ]  # fmt: skip
    files = {
        "TextVQA_0.5.1_val.json": {"data": rows},
        "llava_textvqa_val_v051_ocr.jsonl": ocr,
    }
    return files, ["textvqa/train_images/0054c91397f2fe05.jpg"]


def _vizwiz() -> tuple[Files, list[str]]:
    names = ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"]
    answers = [{"answer": "ball", "answer_confidence": "yes"}] * 10
    rows = [
        {"image": name, "question": "What is this? and what color is it?", "answers": answers,
         "answer_type": "other", "answerable": 1}
        for name in names
    ]  # fmt: skip
    return {"val.json": rows}, [f"vizwiz/val/{name}" for name in names]


PUBLISHED: Mapping[str, Callable[[], tuple[Files, list[str]]]] = {
    "pope": _pope,
    "hallusionbench": _hallusionbench,
    "amber-discriminative": _amber,
    "amber-generative": _amber_generative,
    "chair": _chair,
    "mme": _mme,
    "mmbench": _mmbench,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "vizwiz": _vizwiz,
}
