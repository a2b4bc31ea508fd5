"""The forms of answer files that the published programs read, and of LLaVA's question files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realign.evaluation.answer_files import Answered
from realign.evaluation.benchmarks.hallusionbench import UNCLEAR, VERDICT, verdict
from realign.evaluation.benchmarks.mmbench import MMBENCH
from realign.evaluation.benchmarks.mme import QUESTION_END
from realign.evaluation.benchmarks.pope import LLAVA_FIRST_ID
from realign.evaluation.benchmarks.scienceqa import SCIENCEQA
from realign.evaluation.benchmarks.textvqa import VIZWIZ
from realign.evaluation.judging import JUDGE, REPLY, Replies
from realign.evaluation.prompt_texts import SHORT_ANSWER
from realign.evaluation.rows import Row
from realign.evaluation.vqa_answers import official_form
from realign.runtime.files import content_sha256, json_text


class Request(NamedTuple):
    """The input of a form."""

    answers: Mapping[str, Sequence[Answered]]
    """Answers by task, in the order of the data; without texts for a file of questions."""
    data: Path
    model: str
    """The name of the model in LLaVA's files."""
    out: Path


class Written(NamedTuple):
    """The files to write."""

    files: Mapping[str, str]
    """Texts by name; the only file of a form has no name."""
    notes: Sequence[str] = ()
    """Notes on changes to the answers, and on limits of the file."""


class Form(NamedTuple):
    """One form of answer or question files."""

    write: Callable[[Request], Written]
    needs_answers: bool = True
    needs_all: bool = False
    """True if the published program reads by position, so that no answer may be missing."""
    suffixes: tuple[str, ...] = ()
    """The suffixes that the file may have, if they decide its format."""


def _lines(records: Iterable[Mapping[str, Any]]) -> Written:
    return Written({"": "".join(json_text(record) + "\n" for record in records)})


def _list(records: Iterable[Mapping[str, Any]]) -> Written:
    return Written({"": json_text([*records], indent=1) + "\n"})


def _all(request: Request) -> list[Answered]:
    return [item for found in request.answers.values() for item in found]


def llava_answers(
    question_id: Callable[[Row], Any], prompt: Callable[[Row], str]
) -> Callable[[Request], Written]:
    """Return the form of LLaVA's answers: a line of JSON for each."""

    def write(request: Request) -> Written:
        return _lines(
            {
                "question_id": question_id(item.row),
                "prompt": prompt(item.row),
                "text": item.answer.strip(),
                "answer_id": content_sha256(item.row["where"], item.answer)[:22],
                "model_id": request.model,
                "metadata": {},
            }
            for item in _all(request)
        )

    return write


def llava_questions(
    question_id: Callable[[Row], Any],
    prompt: Callable[[Row], str],
    category: Callable[[Row], str] = lambda row: "default",
    *,
    image: Callable[[Row, Path], str] = lambda row, data: str(row["image"]),
    order: Sequence[str] = (),
    note: str = "",
) -> Callable[[Request], Written]:
    """Return the form of LLaVA's questions.

    Args:
        question_id: Of a row.
        prompt: Of a row.
        category: Of a row.
        image: Of a row and the folder of data, below LLaVA's folder of images.
        order: The tasks, where LLaVA has them in another order.
        note: Note on the contents of LLaVA's file that this one lacks.
    """

    def write(request: Request) -> Written:
        tasks = sorted(request.answers, key=order.index) if order else request.answers
        lines = _lines(
            {
                "question_id": question_id(item.row),
                "image": image(item.row, request.data),
                "text": prompt(item.row),
                "category": category(item.row),
            }
            for task in tasks
            for item in request.answers[task]
        )
        return lines._replace(notes=(note,) if note else ())

    return write


def _short(row: Row) -> str:
    return str(row["text"]) + SHORT_ANSWER


def _pope_split(row: Row) -> str:
    return str(row["id"]).split("-")[0]


def pope_lists(request: Request) -> Written:
    """Write POPE's own answers: a file for each split, in the order of its questions."""
    return Written(
        {
            f"{task.removeprefix('pope_')}.jsonl": _lines(
                {"question": item.row["text"], "answer": item.answer.strip()} for item in found
            ).files[""]
            for task, found in request.answers.items()
        },
        ("The published script scores a file at a time: set its ans_file and label_file.",),
    )


def amber_list(request: Request) -> Written:
    """Write AMBER's answers as they are, since its script compares them exactly."""
    answered = _all(request)
    other = sum(item.answer not in ("Yes", "No") for item in answered)
    note = (
        f"{other:,} answers are not exactly Yes or No, which the published script counts as wrong"
    )
    written = _list({"id": int(item.row["id"]), "response": item.answer} for item in answered)
    return written._replace(notes=(f"{note}.",) if other else ())


# of a row, but not of the published file, or of other answers
_ADDED = {"where", "text", "image", "id", "set", "merged_set", "may_be_unclear", "splits"}
_ADDED |= {"model_prediction", "item", VERDICT, REPLY, JUDGE}


def hallusionbench_list(request: Request) -> Written:
    """Write the published questions with the answers, and their verdicts if there are any."""
    return _list(
        {key: value for key, value in item.row.items() if key not in _ADDED}
        | {"model_prediction": item.answer.strip()}
        | _judgement(item.replies)
        for item in _all(request)
    )


def _judgement(replies: Replies) -> dict[str, Any]:
    """Return the fields that hold a judge's replies; the published code of one, where it is one."""
    if not replies:
        return {}
    texts = [reply.text for reply in replies]
    found: dict[str, Any] = {REPLY: texts if len(texts) > 1 else texts[0]}
    about = replies[0]._asdict()
    del about["text"]
    if any(about.values()):
        found[JUDGE] = about
    if len(texts) == 1 and texts[0] is not None:
        found[VERDICT] = verdict(texts[0]) or str(UNCLEAR)  # as the published script has it
    return found


def mme_folder(request: Request) -> Written:
    """Write a ``task.txt`` for each task: image, question, label and answer between tabs, the two
    questions of an image one after the other.
    """
    files, replaced = {}, 0
    for found in request.answers.values():
        of_image: dict[str, list[str]] = {}
        for item in found:
            answer = item.answer.strip()
            # one space for each, since the rules read the first four characters
            plain = re.sub(r"[\t\n\r]", " ", answer)
            replaced += plain != answer
            task, image = item.row["image"].split("/", 1)
            columns = (image, item.row["text"], item.row["label"].capitalize(), plain)
            of_image.setdefault(image, []).append("\t".join(columns) + "\n")
        files[f"{task}.txt"] = "".join(line for lines in of_image.values() for line in lines)
    note = f"A tab or a line break became a space in {replaced:,} answers."
    return Written(files, (note,) if replaced else ())


def mme_prompt(row: Row) -> str:
    """Return LLaVA's question: the published one with another end."""
    return str(row["text"]).replace(QUESTION_END, "").strip() + SHORT_ANSWER


def mme_image(row: Row, data: Path) -> str:
    """Return the image of a question below the folder of data."""
    task, name = row["image"].split("/", 1)
    return f"{task}/images/{name}" if (data / task / "images").is_dir() else f"{task}/{name}"


def mmbench_table(request: Request) -> Written:
    """Write the table that MMBench's server takes, with tabs or commas."""
    text = io.StringIO(newline="")
    dialect = "excel-tab" if request.out.suffix == ".tsv" else "excel"
    letters = ("A", "B", "C", "D")
    table = csv.writer(text, dialect, lineterminator="\n")
    table.writerow(["index", "question", *letters, "prediction", "answer"])
    for item in _all(request):
        choices = [item.row["choices"].get(letter, "") for letter in letters]
        question, answer = item.row["text"], item.answer.strip()
        table.writerow([item.row["id"], question, *choices, answer, item.row["label"]])
    return Written({"": text.getvalue()}, ("The server takes a sheet: save the table as .xlsx.",))


def science_prompt(row: Row) -> str:
    """Return a question, marked where it has an image: LLaVA's script counts images by that."""
    prompt = SCIENCEQA.prompts["llava"].text(row)
    return f"<image>\n{prompt}" if row["has_image"] else prompt


def textvqa_list(request: Request) -> Written:
    """Write the file that the server of TextVQA takes."""
    return _list(
        {"question_id": _number(item.row["id"]), "answer": item.answer.strip()}
        for item in _all(request)
    )


def vizwiz_list(*, normalizes: bool) -> Callable[[Request], Written]:
    """Return the form that the server of VizWiz takes, with answers unchanged or normalized as by
    LLaVA's script.
    """

    def write(request: Request) -> Written:
        return _list(
            {
                "image": item.row["image"],
                "answer": official_form(item.answer) if normalizes else item.answer.strip(),
            }
            for item in _all(request)
        )

    return write


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


FORMS: dict[str, dict[str, Form]] = {
    "pope": {
        "llava": Form(llava_answers(lambda row: row["llava_id"], _short)),
        "official": Form(pope_lists, needs_all=True),
        "llava-questions": Form(
            llava_questions(
                lambda row: row["llava_id"],
                _short,
                _pope_split,
                order=[f"pope_{split}" for split in LLAVA_FIRST_ID],
            ),
            needs_answers=False,
        ),
    },
    "hallusionbench": {"official": Form(hallusionbench_list)},
    "amber-discriminative": {"official": Form(amber_list)},
    "mme": {
        "llava": Form(llava_answers(lambda row: row["image"], mme_prompt)),
        "official": Form(mme_folder, needs_all=True),
        "llava-questions": Form(
            llava_questions(
                lambda row: row["image"], mme_prompt, lambda row: row["task"], image=mme_image
            ),
            needs_answers=False,
        ),
    },
    "mmbench": {
        "llava": Form(llava_answers(lambda row: int(row["id"]), MMBENCH.prompts["llava"].text)),
        "official": Form(mmbench_table, suffixes=(".tsv", ".csv")),
    },
    "scienceqa": {"llava": Form(llava_answers(lambda row: row["id"], science_prompt))},
    "textvqa": {
        "llava": Form(llava_answers(lambda row: row["image_id"], _short)),
        "official": Form(textvqa_list),
        "llava-questions": Form(
            llava_questions(
                lambda row: row["image_id"],
                _short,
                note="The prompts hold no tokens of an OCR system, as those of LLaVA do.",
            ),
            needs_answers=False,
        ),
    },
    "vizwiz": {
        "llava": Form(llava_answers(lambda row: _number(row["id"]), VIZWIZ.prompts["llava"].text)),
        "official": Form(vizwiz_list(normalizes=False)),
        "llava-upload": Form(vizwiz_list(normalizes=True)),
        "llava-questions": Form(
            llava_questions(lambda row: _number(row["id"]), VIZWIZ.prompts["llava"].text),
            needs_answers=False,
        ),
    },
}
