"""A family is its own files: a stranger's one works through its record alone, and no other file knows the shipped ones.

The places that ask are the registry's: loading by name and from files, memory, conversion, listing, `attach`.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.adapters.attachment import attach
from foveate.cli.models import all_models
from foveate.core.errors import CheckpointError, FoveateError
from foveate.families import registry
from foveate.families.convert import convert
from foveate.families.memory import count_parameters, memory_need
from foveate.families.published import PUBLISHED
from foveate.families.spec import ModelSpec
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.weights.random_weights import fill_randomly
from tests import toy_family

SOURCES = Path(fv.__file__).parent


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """Registers the stranger's family; what it publishes is listed as if the tuple had held it from the start."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, toy_family.FAMILY))
    (entry,) = toy_family.FAMILY.published()
    monkeypatch.setitem(PUBLISHED, entry.spec.name, entry)
    return entry.spec


@pytest.fixture
def files(spec: ModelSpec, tmp_path: Path) -> Path:
    """Transformer and autoencoder as trainers write them; returns the transformer."""
    transformer, autoencoder = toy_family.Dots(spec.transformer), Autoencoder(spec.autoencoder)
    fill_randomly(transformer, 1)
    fill_randomly(autoencoder, 2)
    torch.save({"model": transformer.state_dict()}, tmp_path / "tuned.pth")
    torch.save(autoencoder.state_dict(), tmp_path / "spots.pth")
    return tmp_path / "tuned.pth"


def test_a_new_family_generates_from_files(files: Path, spec: ModelSpec) -> None:
    pipe = Pipeline.from_pretrained(files)
    assert (pipe.model.spec.family, pipe.model.spec.name) == ("dots", "tuned")
    assert pipe.model.spec.transformer == spec.transformer
    output = pipe(["two words", "now three words"], seed=3)
    assert [image.size for image in output.images] == [(256, 256)] * 2
    assert output.images[0].tobytes() != output.images[1].tobytes()
    again = pipe("other words", seed=3).images[0]
    assert again.tobytes() == output.images[0].tobytes(), "two words are two words"
    with pytest.raises(FoveateError, match="takes no negative_prompt"):
        pipe("a", negative_prompt="b")


def test_a_new_family_is_told_from_the_others(files: Path) -> None:
    torch.save({"cfg_uncond": torch.zeros(2, 3)}, files.with_name("other.pth"))
    with pytest.raises(CheckpointError, match="those of a transformer of dots, expected a VQ autoencoder"):
        Pipeline.from_pretrained(files, autoencoder=files)
    with pytest.raises(CheckpointError, match="an Infinity transformer, expected a transformer of dots"):
        toy_family.load_dots(toy_family.Dots(toy_family.FAMILY.published()[0].spec.transformer),
                             {"cfg_uncond": torch.zeros(2, 3)})  # fmt: skip


def test_a_new_family_runs_by_name_with_random_weights(spec: ModelSpec) -> None:
    pipe = Pipeline.from_pretrained("dots-d2", weights="random")
    output = pipe("three small words", seed=1, policy="skip-scales")
    assert output.images[0].size == (256, 256)
    assert output.report.flops_ratio < 1
    assert output.config["guidance_scale"] == [1.5] * 5


def test_a_new_family_is_listed_counted_and_stored(spec: ModelSpec) -> None:
    listed = {model["name"]: model for model in all_models()}["dots-d2"]
    assert (listed["family"], listed["hub"], listed["default_size"]) == ("dots", "someone/dots", [256, 256])
    assert count_parameters(spec)["text_encoder"] == 7
    need = memory_need(spec, torch.float32, fv.Full())
    assert need.text_encoder == 28
    assert need.transformer == 4 * count_parameters(spec)["transformer"]
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_new_family_is_converted(files: Path, tmp_path: Path) -> None:
    done = convert(files, tmp_path / "out" / "dots.safetensors")
    assert done.kind == "Dots"
    assert Pipeline.from_pretrained(done.files[0], autoencoder=tmp_path / "spots.pth").model.spec.family == "dots"


def test_a_new_family_is_attached_through_its_record(spec: ModelSpec) -> None:
    class Official(toy_family.Dots):
        def autoregressive_infer_cfg(self, B: int) -> None:
            """What the stand-in replaces."""

    with attach(Official(spec.transformer)) as attachment:
        assert type(attachment.adapter).__name__ == "OfficialDots"
    with pytest.raises(FoveateError, match=r"an Infinity or VAR or Dots object .*cfg_uncond nor class_emb.weight nor"):
        attach(nn.Linear(2, 2))


FAMILY_FILES = ("models", "weights", "families", "adapters")
CLASSES = {
    cls.__name__: family.name
    for family in registry.FAMILIES
    for cls in (family.transformer.config, family.transformer.build)
    if isinstance(cls, type)
}
NAMES = {family.name for family in registry.FAMILIES}
NAMES |= {family.transformer.kind for family in registry.FAMILIES}
NAMES |= {conditioning.name for family in registry.FAMILIES for conditioning in family.conditionings}


def sources_outside(name: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module that is not a file of this family."""
    own = {f"{folder}/{name}.py" for folder in FAMILY_FILES}
    for path in sorted(SOURCES.rglob("*.py")):
        place = path.relative_to(SOURCES).as_posix()
        if place not in own:
            yield place, ast.parse(path.read_text(encoding="utf-8"))


def identifiers(tree: ast.Module) -> set[str]:
    """Names that code uses or imports."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("cls", sorted(CLASSES))
def test_classes_of_a_family_are_named_in_its_own_files_alone(cls: str) -> None:
    # The contract of policies runs on a tiny real model, which has to be of some family.
    users = [place for place, tree in sources_outside(CLASSES[cls]) if cls in identifiers(tree)]
    assert [place for place in users if place != "testing/toys.py"] == []


def chosen_by(tree: ast.Module) -> set[str]:
    """Texts that code looks something up by, or compares with."""
    parts: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            parts += node.keys
        elif isinstance(node, ast.Subscript):
            parts.append(node.slice)
        elif isinstance(node, ast.Compare):
            parts += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts.append(node.value)
    constants = (node for part in parts if part is not None for node in ast.walk(part))
    return {str(node.value) for node in constants if isinstance(node, ast.Constant)}


def test_nothing_is_chosen_by_the_name_of_a_family_or_of_what_it_reads() -> None:
    found = {place: NAMES & chosen_by(tree) for place, tree in sources_outside("")}
    # Numbers can be infinite.
    assert {place: names for place, names in found.items() if names} == {"core/finite.py": {"infinity"}}
