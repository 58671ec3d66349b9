"""What a name means, a path or a repository on the hub, and what is said where its weights may change."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.hub import is_commit, is_repository
from foveate.families.loading import Origin, Precision, find_spec, load_model
from foveate.families.published import PUBLISHED
from foveate.families.sources import fetch_published
from foveate.families.spec import Published, WeightSource
from foveate.models.var import VAR
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.weights.random_weights import fill_randomly
from tests.pipeline.test_published import TOY_VAR, VQ

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PATHS = (
    "weights/model.pth", "weights/model.safetensors", "a/b.gguf", "./a", "./owner/name", "../owner/name", "/owner/name",
    "~/name", "~owner/name", ".owner/name", "owner/.name", "owner/name/", "owner/name/part", "a//b", "/", "owner/",
    "C:\\models\\var", "owner/na me", "https://huggingface.co/owner/name", "model.pth", "model.ckpt", "vær/d16",
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """Counts what the hub is asked for, and gives a VAR model; its cache names folders as the real one does."""
    folder = tmp_path / "cache" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for seed, (name, module) in enumerate((("var_toy", VAR(TOY_VAR)), ("vae_ch160v4096z32", Autoencoder(VQ)))):
        fill_randomly(module, seed)
        torch.save(module.state_dict(), folder / f"{name}.pth")
    asked: list[tuple[str, str | None]] = []

    def one(repo: str, path: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((repo, revision))
        return str(folder / path)

    def many(repo: str, *, revision: str | None, local_files_only: bool, allow_patterns: object) -> str:
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", many)
    return asked


@pytest.mark.parametrize("name", PATHS)
def test_a_path_never_reaches_the_hub(name: str, hub: list[object]) -> None:
    assert not is_repository(name)
    for origin in (Origin(name_or_path=name), Origin(name_or_path=Path(name), revision="main")):
        if Path(name).exists():
            continue
        with pytest.raises(CheckpointError) as caught:
            find_spec(origin)
        assert f"no model at {origin.name_or_path}: no such file or folder" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not hub


@pytest.mark.parametrize("name", ["emojo", "var-d17", "no such model", "model-2.5"])
def test_a_word_that_is_no_model_is_said_with_all_that_are(name: str, hub: list[object]) -> None:
    with pytest.raises(FoveateError, match=r"no model '.*there are emoji, .*no such file.*owner/name on the hub$"):
        find_spec(Origin(name_or_path=name))
    assert not hub


@pytest.mark.parametrize(
    "name", ["owner/name", "Owner-1/name_2", "o/model-2.5", "Qwen/Qwen2.5-VL", "a.b/c", "weights/x"]
)
def test_the_hub_is_asked_for_owner_and_name(name: str, hub: list[object]) -> None:
    assert is_repository(name)
    assert not is_repository(Path(name))
    assert find_spec(Origin(name_or_path=name)).family == "var"
    assert hub[0] == (name, None)


def test_a_folder_of_that_name_comes_before_the_hub(
    hub: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "cache" / "snapshots" / COMMIT, tmp_path / "owner" / "name")
    assert not is_repository("owner/name")
    assert load("owner/name") == ()
    assert not hub


def test_other_parts_are_looked_for_before_anything_is_fetched(hub: list[object], tmp_path: Path) -> None:
    for part, said in (
        ({"autoencoder": tmp_path / "none.pth"}, r"none\.pth: no such file"),
        ({"text_encoder": "./t5"}, r"no text encoder at \./t5: no such file"),
        ({"text_encoder": Path("owner/t5")}, "no text encoder at owner/t5: no such file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Pipeline.from_pretrained("infinity-2b", **part)  # type: ignore[arg-type]
    assert not hub


def load(name: str, revision: str | None = None) -> tuple[str, ...]:
    """Messages of the warnings, which all have the one code."""
    model = load_model(
        Origin(name_or_path=name, revision=revision),
        weights="pretrained",
        precision=Precision(dtype=torch.float32),
        device=torch.device("cpu"),
    )
    assert {warning.code for warning in model.warnings} <= {"weights_unpinned"}
    return tuple(warning.message for warning in model.warnings)


def var_entry(revision: str | None = None) -> Published:
    spec = replace(PUBLISHED["var-d16"].spec, transformer=TOY_VAR, autoencoder=VQ)
    source = WeightSource(repo="someone/var", path="var_toy.pth")
    return replace(
        PUBLISHED["var-d16"], spec=spec, transformer=source, revision=revision,
        autoencoder=WeightSource(repo="someone/var", path="vae_ch160v4096z32.pth"),
    )  # fmt: skip


UNPINNED = f"come from someone/var without a commit, so they may change there; ask for .*revision={COMMIT} "


@pytest.mark.parametrize("name", ["var-d16", "someone/var"])
@pytest.mark.parametrize(
    ("revision", "is_pinned"), [(None, False), ("main", False), (COMMIT[:12], False), (COMMIT, True)]
)
def test_weights_of_the_hub_are_pinned_by_a_commit(
    name: str, revision: str | None, *, is_pinned: bool, hub: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "var-d16":
        monkeypatch.setitem(PUBLISHED, name, var_entry())
    messages = load(name, revision)
    assert len(messages) == (not is_pinned)
    assert all(re.search(UNPINNED, message) for message in messages)
    assert set(hub) == {("someone/var", revision)}


def test_a_folder_of_ours_on_the_hub_is_pinned_as_well(
    hub: list[object], toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: str(toy_folder))
    (message,) = load("someone/toy")
    assert "come from someone/toy without a commit" in message
    assert "revision=COMMIT" in message
    assert load("someone/toy", COMMIT) == ()


def test_a_known_commit_is_asked_for(hub: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    known = COMMIT[::-1]
    monkeypatch.setitem(PUBLISHED, "var-d16", var_entry(known))
    assert load("var-d16") == ()
    assert set(hub) == {("someone/var", known)}
    # What the caller asks for comes first.
    assert len(load("var-d16", "main")) == 1
    assert hub[-1] == ("someone/var", "main")


def test_an_autoencoder_of_another_repository_is_not_pinned_with_the_transformer(
    hub: list[object], tmp_path: Path
) -> None:
    entry = replace(var_entry(), autoencoder=WeightSource(repo="someone/vae", path="vae_ch160v4096z32.pth"))
    (warning,) = fetch_published(entry, None, None, COMMIT, local_files_only=False).warnings
    assert "come from someone/vae without a commit" in warning.message
    assert hub == [("someone/var", COMMIT), ("someone/vae", None)]
    own = tmp_path / "cache" / "snapshots" / COMMIT / "vae_ch160v4096z32.pth"
    assert fetch_published(entry, own, None, COMMIT, local_files_only=False).warnings == ()


def test_weights_of_this_disk_need_no_commit(toy_folder: Path, hub: list[object]) -> None:
    assert load("emoji") == ()
    assert load(str(toy_folder)) == ()
    assert not hub


def test_every_known_revision_is_a_whole_commit() -> None:
    assert all(entry.revision is None or is_commit(entry.revision) for entry in PUBLISHED.values())
    assert [is_commit(name) for name in (COMMIT, COMMIT.upper(), COMMIT[1:], f"{COMMIT}0", "main", None)] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
