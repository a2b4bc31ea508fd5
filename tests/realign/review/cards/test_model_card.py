"""The card of a model: true to the files of the run, and readable for the hub's own library."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from typer.testing import CliRunner

from realign.cli import app
from realign.config import TrainConfig
from realign.config_file import load_config
from realign.errors import RefusedError
from realign.evaluation.table import split_of
from realign.review.cards.card import write_card
from realign.review.cards.licence import Licence
from realign.review.cards.model_card import CardOptions
from realign.review.cards.template import code, plain
from tests.realign.review.cards.conftest import BASE

NAMED = CardOptions(repo="user/aligned", base_model=BASE, dataset="user/pairs")


def written(path: Path, options: CardOptions = NAMED) -> tuple[ModelCard, str]:
    """The card as the hub's library reads it, and its text."""
    place = write_card(path, options, overwrite=True)
    return ModelCard.load(place), place.read_text(encoding="utf-8")


def test_the_metadata_match_the_schema_of_the_hub(run: Path) -> None:
    data = written(run)[0].data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.library_name, data.pipeline_tag) == ("peft", "image-text-to-text")
    assert data.tags == ["realign", "rdpo", "lora"]
    assert data.datasets == ["user/pairs"]
    # of the card in the base's folder, whose link is to a file beside it
    assert (data.license, data.license_name, data.get("license_link")) == ("other", "scenes", None)


def test_the_card_shows_the_scores_of_the_evaluation(run: Path) -> None:
    card, text = written(run)
    scores = json.loads((run / "eval" / "scores.json").read_text())
    expected = []
    for row in scores["table"]:
        split = split_of(scores, row)
        score = split["models"]["aligned"][row["metric"]]
        if score["value"] is None:
            continue
        percent = [round(100 * bound, 2) for bound in score["interval"]]
        expected.append((row["task"], row["metric"], round(100 * score["value"], 2), percent))
        shown = f"{100 * score['value']:.1f} [{percent[0]:.1f}, "
        assert shown in text
        (line,) = [
            line for line in text.splitlines() if line.startswith(f"| {plain(row['label'])}")
        ]
        assert f"| {row['rule']} | {split['items']} |" in line
    results = card.data.eval_results
    assert len(expected) > 4
    assert all(isinstance(result, EvalResult) for result in results)
    found = [
        (r.dataset_type, r.metric_type, r.metric_value, r.metric_args["interval_95"])
        for r in results
    ]
    assert sorted(found) == sorted(expected)
    assert {result.metric_args["rule"] for result in results} == {"official", "object-list"}
    assert all("difference_interval_95" in result.metric_args for result in results)
    assert "with 50 draws" in text
    assert "pope with the prompt official and at most 128 tokens" in " ".join(text.split())


def test_scores_of_other_weights_are_not_shown(run: Path, finished: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "checkpoint" / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    card, text = written(run)
    assert card.data.eval_results is None
    assert "These weights were not evaluated." in text
    with pytest.raises(RefusedError, match="which has not measured them"):
        write_card(run, CardOptions(evaluation=finished / "eval"), overwrite=True)


def test_the_card_of_the_baseline_model_has_scores_without_differences(run: Path) -> None:
    claim = json.loads((run / "eval" / "eval.json").read_text())
    scores = json.loads((run / "eval" / "scores.json").read_text())
    claim["models"]["base"] = claim["models"].pop("aligned")
    (run / "eval" / "eval.json").write_text(json.dumps(claim))
    assert scores["baseline"] == "base"
    card, text = written(run)
    assert "| metric | rule | items | this model |\n" in text
    assert not any("difference" in result.metric_args for result in card.data.eval_results)


def test_the_recipe_of_the_card_gives_the_same_options(run: Path, tmp_path: Path) -> None:
    text = written(run)[1]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    flags = {"model": "m", "data": "d", "out": "o"}
    options = load_config(TrainConfig, tmp_path / "recipe.yaml", flags=flags)
    stored = json.loads((run / "train.json").read_text())["config"]
    assert {name: options.model_dump(mode="json")[name] for name in stored} == stored
    assert yaml.safe_load(recipe)["train"].keys() == {
        *("batch_size", "freeze_projector", "learning_rate", "lora", "pairs_per_step"),
    }
    pairs = json.loads((run / "checkpoint.json").read_text())["pairs"]
    assert pairs == len(json.loads((run / "row_index.json").read_text())["rows"])
    steps = -(-pairs // 4)
    for line in (
        f"| pairs | {pairs} |",
        "| pairs per step | 4 |",
        f"| steps | {steps}; epochs: 1 |",
    ):
        assert line in text
    assert "| LoRA | rank 4, alpha 8, on all-linear |" in text
    assert "| parts that did not train | vision tower, projector |" in text


def test_the_card_contains_no_local_path(run: Path, tmp_path: Path, finished: Path) -> None:
    for options in (NAMED, CardOptions()):
        text = written(run, options)[1]
        assert str(tmp_path) not in text
        assert str(finished.parent) not in text


def test_unknown_names_are_marked_as_placeholders(run: Path) -> None:
    card, text = written(run, CardOptions())
    assert "base_model" not in card.data.to_dict()
    assert '.from_pretrained("BASE"' in text
    assert "`BASE` stands for `base` (a local folder)." in text
    assert "`REPOSITORY` stands for the name of this repository" in text


def test_the_licence_is_the_given_one_or_that_of_the_base_or_absent(
    run: Path, finished: Path
) -> None:
    given = CardOptions(licence=Licence("apache-2.0"))
    assert written(run, given)[0].data.license == "apache-2.0"
    config = run / "checkpoint" / "adapter_config.json"
    adapter = json.loads(config.read_text())
    adapter["base_model_name_or_path"] = "org/never-downloaded"
    config.write_text(json.dumps(adapter))
    card, _ = written(run, CardOptions())
    assert "license" not in card.data.to_dict()
    assert card.data.base_model == "org/never-downloaded"


def test_the_licence_of_a_hub_base_is_read_from_the_local_cache(
    run: Path, monkeypatch, tmp_path
) -> None:
    snapshot = tmp_path / "cache" / "models--org--vlm" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    text = "---\nlicense: other\nlicense_name: vlm\nlicense_link: LICENSE\n---\n"
    (snapshot / "README.md").write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = run / "checkpoint" / "adapter_config.json"
    adapter = json.loads(config.read_text()) | {"base_model_name_or_path": "org/vlm"}
    config.write_text(json.dumps(adapter))
    data = written(run, CardOptions())[0].data
    link = "https://huggingface.co/org/vlm/blob/main/LICENSE"
    assert (data.license, data.license_name, data.license_link) == ("other", "vlm", link)


def test_the_card_of_a_merged_model_has_its_recipe_and_no_scores(
    run: Path, finished: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(finished.parent / "base", merged)
    (merged / "README.md").unlink()
    options = CardOptions(run=run, base_model=BASE, repo="user/merged")
    card, text = written(merged, options)
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert "| objective | `rdpo` |" in text
    assert "peft" not in text
    assert "vllm serve user/merged" in text
    with pytest.raises(RefusedError, match=r"run must be a folder of `realign train`, got"):
        write_card(merged, CardOptions(run=tmp_path))


def test_a_run_of_an_earlier_version_gets_a_card(run: Path) -> None:
    (run / "checkpoint.json").unlink()
    text = written(run)[1]
    assert "trained with rDPO by" in text
    assert "| steps | " in text


def test_an_edited_card_is_not_overwritten(run: Path) -> None:
    def card(*options: str):
        return CliRunner().invoke(app, ["card", str(run), *options])

    path = run / "checkpoint" / "README.md"
    first = card()
    assert first.exit_code == 0, first.output
    text = path.read_text()
    assert card("--license", "mit").exit_code == 0  # its own card is replaced
    assert "license: mit" in path.read_text()
    for edited in (path.read_text().replace("## Use", "## How to use"), text[:-40], "# Mine\n", ""):
        path.write_text(edited)
        refused = card()
        assert refused.exit_code == 2
        assert "Pass --overwrite to replace it." in refused.output
        assert path.read_text() == edited
    assert card("--overwrite").exit_code == 0
    assert path.read_text() == text
    assert [one.name for one in path.parent.iterdir() if one.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--license", "Apache-2.0"), "license must be an identifier of the hub in small letters"),
        (("--license", "other"), "license other requires a name, has none. Pass --license-name"),
        (("--license-name", "mine"), "license-name and license-link require license"),
        (("--repo", "aligned"), "repo must be a name on the hub of the form user/name"),
        (("--base-model", "../base"), "base-model must be a name on the hub of the form user/name"),
        (("--dataset", "a/b/c"), "dataset must be a name on the hub of the form user/name"),
        (("--eval", "none"), "eval must be a folder of `realign eval`, got none, which does not"),
    ],
)
def test_invalid_options_are_refused(options, message: str, run: Path) -> None:
    result = CliRunner().invoke(app, ["card", str(run), *options])
    assert result.exit_code == 2
    assert message in result.output
    assert not (run / "checkpoint" / "README.md").exists()


def test_paths_without_a_run_are_refused(run: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(RefusedError) as refused:
            write_card(path, CardOptions())
        return str(refused.value)

    assert "which does not exist" in refusal(tmp_path / "none")
    assert "holds neither checkpoint/, nor config.json" in refusal(run / "eval")
    assert "got the file" in refusal(run / "train.json")
    shutil.copy(run / "dataset" / "dataset.parquet", run)
    assert f"Give {run / 'checkpoint'} or {run / 'dataset.parquet'}." in refusal(run)
    (run / "dataset.parquet").unlink()
    shutil.rmtree(run / "checkpoint")
    assert "Give the same `realign train` again until it ends." in refusal(run)
    (run / "train.json").write_text("[]")
    (run / "checkpoint").mkdir()
    shutil.copy(run / "dataset" / "build.json", run / "checkpoint" / "config.json")
    assert "train.json must be one of `realign train`" in refusal(run)


def test_an_adapter_without_whole_weights_is_refused(run: Path) -> None:
    file = run / "checkpoint" / "adapter_model.safetensors"
    shutil.rmtree(run / "eval")
    file.write_bytes(file.read_bytes()[:1000])
    for message in ("must be a whole safetensors file, got", "must hold adapter_model.safetensors"):
        result = CliRunner().invoke(app, ["card", str(run)])
        assert result.exit_code == 2
        assert message in result.output
        file.unlink(missing_ok=True)


def test_external_text_is_escaped_for_table_cells_and_code() -> None:
    assert plain("a | b\n# [x](y) <b> `c`") == r"a \| b \# \[x\](y) \<b\> \`c\`"
    assert code("a`b|c\nd") == r"`a'b\|c d`"
