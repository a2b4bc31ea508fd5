"""Uploads to a hub on this machine by the hub's own library, and refusals before any request."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from realign.cli import app
from realign.data.decisions import Decision, append_decision
from realign.data.formats.parquet import read_parquet, write_parquet
from tests.ports import closed_port
from tests.realign.review.cards.conftest import BASE
from tests.realign.review.cards.hub import TOKEN, Hub

# of the hub's library, which hands its client a file so
OF_LIBRARY = "Use 'content=<...>' to upload raw bytes/text content."
pytestmark = pytest.mark.filterwarnings(f"ignore:{OF_LIBRARY}:DeprecationWarning")


def realign(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def ready(run: Path) -> Path:
    """A run whose adapter and dataset may be pushed."""
    config = run / "checkpoint" / "adapter_config.json"
    adapter = json.loads(config.read_text()) | {"base_model_name_or_path": BASE}
    config.write_text(json.dumps(adapter))
    for path in (run, run / "dataset"):
        assert realign("card", path, "--license", "mit").exit_code == 0
    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_goes_to_a_new_private_repository_in_one_commit(ready: Path, hub: Hub) -> None:
    result = realign("push", ready, "--repo", "user/aligned")
    assert result.exit_code == 0, result.output
    assert hub.private == {"models/user/aligned": True}
    (commit,) = hub.commits["models/user/aligned"]
    assert commit == files_of(ready / "checkpoint")
    assert f"-> {hub.url}/models/user/aligned/commit/1" in result.output
    again = realign("push", ready, "--repo", "user/aligned")  # an existing one of the same kind
    assert again.exit_code == 0, again.output
    assert len(hub.commits["models/user/aligned"]) == 2


def test_only_the_rows_and_the_card_of_a_build_are_uploaded(ready: Path, hub: Hub) -> None:
    result = realign("push", ready / "dataset", "--repo", "user/pairs", "--public")
    assert result.exit_code == 0, result.output
    assert hub.private == {"datasets/user/pairs": False}
    (commit,) = hub.commits["datasets/user/pairs"]
    names = ("README.md", "dataset.parquet")
    assert commit == {name: (ready / "dataset" / name).read_bytes() for name in names}
    assert "build.json, embeddings, funnel.json, " in result.output.partition("stays here: ")[2]


def test_a_dry_run_lists_the_files_and_sends_no_request(ready: Path, hub: Hub) -> None:
    result = realign("push", ready, "--repo", "user/aligned", "--dry-run")
    assert result.exit_code == 0, result.output
    for name, content in files_of(ready / "checkpoint").items():
        assert name in result.output
        assert (f"{len(content)} bytes" if len(content) < 1000 else "kB") in result.output
    assert f"{len(files_of(ready / 'checkpoint'))} files, " in result.output
    assert "would go to the private model user/aligned" in result.output
    assert hub.requests == []


def test_the_push_command_is_configured_by_its_environment(
    ready: Path, hub: Hub, tmp_path: Path
) -> None:
    """The command runs in its own process, where every warning is an error."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    python = [sys.executable, "-W", "error", "-W", f"ignore:{OF_LIBRARY}:DeprecationWarning"]
    command = [*python, "-m", "realign", "push", str(ready), "--repo", "user/aligned"]
    subprocess.run(command, check=True, env=environment)
    (commit,) = hub.commits["models/user/aligned"]
    assert commit == files_of(ready / "checkpoint")


@pytest.mark.parametrize(("is_private", "flag"), [(False, ()), (True, ("--public",))])
def test_a_repository_of_another_visibility_is_refused_and_unchanged(
    is_private: bool, flag, ready: Path, hub: Hub
) -> None:
    hub.private["models/user/aligned"] = is_private
    result = realign("push", ready, "--repo", "user/aligned", *flag)
    assert result.exit_code == 2
    seen, asked = ("private", "public") if is_private else ("public", "private")
    assert f"user/aligned must be {asked} as asked, is {seen} already." in result.output
    assert hub.private == {"models/user/aligned": is_private}
    assert hub.commits == {}


def test_a_missing_token_or_network_is_reported_in_one_line(
    ready: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(repo: str = "user/aligned") -> str:
        result = realign("push", ready, "--repo", repo)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        return result.output.splitlines()[-1]

    assert "must be allowed to write to others/aligned, got 403" in refusal("others/aligned")
    hub.failing = ("/commit/",)
    assert "the hub must take user/aligned, got 500" in refusal()
    hub.failing = ()
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    assert "push requires a valid token of the hub, got 401" in refusal()
    requests = len(hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    assert "has none. Run `hf auth login`, or set HF_TOKEN" in refusal()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "push requires the network, got HF_HUB_OFFLINE. Unset it." in refusal()
    assert len(hub.requests) == requests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with closed_port() as port:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert f"got http://127.0.0.1:{port}, which was not reached" in refusal()
    assert hub.commits == {}


def test_a_card_rejected_by_the_hub_is_refused_with_the_hubs_message(ready: Path, hub: Hub) -> None:
    assert realign("card", ready, "--license", "unheard-of").exit_code == 0
    result = realign("push", ready, "--repo", "user/aligned")
    assert result.exit_code == 2
    assert '"license" must be one of a list' in result.output
    assert hub.commits == {}


def test_a_file_that_the_hub_leaves_out_is_reported(ready: Path, hub: Hub) -> None:
    hub.ignored = ("tokenizer.json",)
    result = realign("push", ready, "--repo", "user/aligned")
    assert result.exit_code == 2
    assert "must take every file, has left out tokenizer.json, which its .git" in result.output


def spoil_weights(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def cut_weights(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (checkpoint.parent / "checkpoint.json").unlink()  # as in a run of an earlier version


def put_nan(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, file)
    (checkpoint.parent / "checkpoint.json").unlink()


def stray(name: str):
    def put(checkpoint: Path) -> None:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("x")

    return put


def take_licence(checkpoint: Path) -> None:
    path = checkpoint / "README.md"
    path.write_text(path.read_text().replace("license: mit\n", ""))


def name_a_path(checkpoint: Path) -> None:
    path = checkpoint / "processor_config.json"
    processor = json.loads(path.read_text())
    processor["image_processor"]["_name"] = "/home/somebody/model"
    path.write_text(json.dumps(processor))


def name_local_base(checkpoint: Path) -> None:
    path = checkpoint / "adapter_config.json"
    adapter = json.loads(path.read_text()) | {"base_model_name_or_path": "/data/models/vlm"}
    path.write_text(json.dumps(adapter))


SPOILED = {
    "no weights": (
        lambda checkpoint: (checkpoint / "adapter_model.safetensors").unlink(),
        "must hold weights as safetensors, holds none.",
    ),
    "one bit": (
        spoil_weights,
        "must be as `realign train` wrote it, was changed or damaged since.",
    ),
    "half written": (cut_weights, "must be a whole safetensors file, got"),
    "not finite": (put_nan, "must hold finite weights, got NaN or infinity in base_model.model."),
    "no card": (
        lambda checkpoint: (checkpoint / "README.md").unlink(),
        "requires a card, has no README.md. Write one: realign card",
    ),
    "no licence": (take_licence, "requires a licence, has none. Write it again with realign card"),
    "broken card": (
        lambda checkpoint: (checkpoint / "README.md").write_text("---\na: [\n---\n"),
        "must begin with YAML between two lines of ---",
    ),
    "optimizer": (stray("optimizer.pt"), "got optimizer.pt, the state of an optimizer."),
    "state": (stray("state/random.json"), "got state, the state of an optimizer."),
    "pickle": (stray("training_args.bin"), "got training_args.bin, a pickle."),
    "secrets": (stray(".env"), "got .env, secrets."),
    "hidden": (stray(".git/config"), "got .git, a hidden file."),
    "cache": (stray("__pycache__/x.pyc"), "got __pycache__, a cache."),
    "unknown": (stray("notes.docx"), "got notes.docx, no part of a model."),
    "template": (
        stray("additional_chat_templates/notes.docx"),
        "got notes.docx, no part of a model.",
    ),
    "path in JSON": (
        name_a_path,
        "processor_config.json must not be a path of this machine to be pushed, got "
        "'/home/somebody/model'. Correct it or remove it.",
    ),
    "local base": (name_local_base, "got '/data/models/vlm'. Set it to the hub id of the base."),
}


@pytest.mark.parametrize("case", SPOILED)
def test_private_or_unsafe_files_are_refused_before_any_request(
    case: str, ready: Path, hub: Hub
) -> None:
    spoil, message = SPOILED[case]
    spoil(ready / "checkpoint")
    for dry_run in ((), ("--dry-run",)):
        result = realign("push", ready, "--repo", "user/aligned", *dry_run)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output
    assert hub.requests == []


def test_a_missing_shard_of_the_weight_index_is_refused(
    finished: Path, tmp_path: Path, hub: Hub
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished.parent / "base", model)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    result = realign("push", model, "--repo", "user/model")
    assert result.exit_code == 2
    assert "must hold all its weights, lacks model-00002-of-00002.safetensors" in result.output
    shutil.copy(model / shards["a"], model / shards["b"])
    assert realign("push", model, "--repo", "user/model").exit_code == 0
    (commit,) = hub.commits["models/user/model"]
    assert commit == files_of(model)


def test_rows_dropped_by_a_decision_are_not_published(ready: Path, hub: Hub) -> None:
    dataset = ready / "dataset"
    row = read_parquet(dataset / "dataset.parquet")[0]
    append_decision(dataset / "decisions.jsonl", Decision(row.id, row.key, "drop"))
    result = realign("push", dataset, "--repo", "user/pairs")
    assert result.exit_code == 2
    assert (
        "must not hold rows that were dropped, got 1 that decisions.jsonl drops." in result.output
    )
    assert hub.requests == []


def test_local_paths_in_rows_are_refused(tmp_path: Path, records, hub: Hub) -> None:
    from dataclasses import replace

    rows = records(3)
    rows[1] = replace(rows[1], meta={"source": {"image": "/home/somebody/x.png"}})
    write_parquet(rows, tmp_path / "dataset.parquet")
    assert realign("card", tmp_path, "--license", "mit").exit_code == 0
    result = realign("push", tmp_path, "--repo", "user/pairs")
    assert result.exit_code == 2
    assert "image in dataset.parquet, row r1, meta must not be a path" in result.output
    assert hub.requests == []


def test_the_repository_must_have_an_owner_and_a_name(ready: Path, hub: Hub) -> None:
    result = realign("push", ready, "--repo", "aligned")
    assert result.exit_code == 2
    assert "repo must be a name on the hub of the form user/name, got 'aligned'" in result.output
    assert hub.requests == []
