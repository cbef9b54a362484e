"""The registry: a file dropped into the plural folder is a member, and nothing about it is guessed."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helix.registry import BLOCKS, DATASETS, FRONTENDS, GRIDS, Registry

MEMBERS = [(registry, name) for registry in (BLOCKS, FRONTENDS, DATASETS) for name in registry.names()]

MEMBER = """
from dataclasses import dataclass
from {package} import REGISTRY

@REGISTRY.register("{name}")
@dataclass(frozen=True, kw_only=True)
class Member:
    size: int = 1
"""


@dataclass(frozen=True, kw_only=True)
class Sponge:
    """A member with an option of every kind."""

    cells: int = 3
    pores: float = 0.5
    colour: str = "yellow"
    alive: bool = True
    arms: tuple[int, ...] = (1, 2)
    limit: int | None = None


@pytest.fixture
def sponges() -> Registry[Any]:
    """A registry that holds one member and scans a folder without any."""
    registry: Registry[Any] = Registry("animal", "helix.models.frontend")
    registry.register("sponge")(Sponge)
    return registry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty package that makes a registry of its own folder."""
    package = tmp_path / f"members_of_{request.node.name}"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"from helix.registry import Registry\nREGISTRY = Registry('animal', '{package.name}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return package


def registry_of(folder: Path) -> Registry[Any]:
    __import__(folder.name)
    return sys.modules[folder.name].REGISTRY


def test_dropping_in_a_file_adds_a_member(folder: Path):
    for name in ("wasp", "bee"):
        (folder / f"{name}.py").write_text(MEMBER.format(package=folder.name, name=name))
    assert registry_of(folder).names() == ("bee", "wasp")


def test_naming_a_registry_imports_no_member(folder: Path):
    (folder / "bee.py").write_text(MEMBER.format(package=folder.name, name="bee"))
    registry = registry_of(folder)
    assert f"{folder.name}.bee" not in sys.modules
    assert dataclasses.is_dataclass(registry["bee"])
    assert f"{folder.name}.bee" in sys.modules


def test_a_member_that_cannot_be_imported_is_loud_every_time(folder: Path):
    (folder / "bee.py").write_text(MEMBER.format(package=folder.name, name="bee"))
    (folder / "wasp.py").write_text("import a_library_that_is_not_there\n")
    registry = registry_of(folder)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
            registry.names()


def test_two_files_may_not_share_a_name(folder: Path):
    (folder / "bee.py").write_text(MEMBER.format(package=folder.name, name="bee"))
    (folder / "wasp.py").write_text(MEMBER.format(package=folder.name, name="bee"))
    here = folder.name
    with pytest.raises(ValueError) as refused:
        registry_of(folder).names()
    assert str(refused.value) == (
        f"two members are called animal 'bee': {here}.bee.Member and {here}.wasp.Member; rename one"
    )


def test_the_same_member_registered_again_is_no_duplicate(sponges: Registry[Any]):
    sponges.register("sponge")(Sponge)
    assert sponges["sponge"] is Sponge


def test_an_unknown_name_is_answered_with_the_known_ones(sponges: Registry[Any]):
    sponges.register("coral")(Sponge)
    with pytest.raises(ValueError) as refused:
        sponges["spong"]
    assert str(refused.value) == "unknown animal 'spong'; known: coral, sponge"


def test_options_become_fields_and_the_rest_keep_their_defaults(sponges: Registry[Any]):
    assert sponges.make("sponge") == Sponge()
    assert sponges.make("sponge", {"cells": 9, "alive": False}) == Sponge(cells=9, alive=False)


@pytest.mark.parametrize(
    ("given", "became"),
    [({"pores": 1}, 1.0), ({"arms": [4]}, (4,)), ({"limit": 5}, 5), ({"limit": None}, None)],
)
def test_json_values_become_the_types_of_the_fields(sponges: Registry[Any], given: dict[str, Any], became: Any):
    (key,) = given
    value = getattr(sponges.make("sponge", given), key)
    assert value == became
    assert type(value) is type(became)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"cels": 3}, "animal 'sponge' has no option 'cels'; it has cells, pores, colour, alive, arms, limit"),
        ({"cells": "3"}, "animal 'sponge': option cells is '3'; wanted int, as in 3"),
        ({"cells": 3.0}, "animal 'sponge': option cells is 3.0; wanted int, as in 3"),
        ({"cells": True}, "animal 'sponge': option cells is True; wanted int, as in 3"),
        ({"cells": None}, "animal 'sponge': option cells is None; wanted int, as in 3"),
        ({"pores": "wide"}, "animal 'sponge': option pores is 'wide'; wanted float, as in 0.5"),
        ({"pores": True}, "animal 'sponge': option pores is True; wanted float, as in 0.5"),
        ({"colour": 7}, "animal 'sponge': option colour is 7; wanted str, as in 'yellow'"),
        ({"alive": 1}, "animal 'sponge': option alive is 1; wanted bool, as in True"),
        ({"arms": "12"}, "animal 'sponge': option arms is '12'; wanted tuple, as in (1, 2)"),
        ({"arms": 3}, "animal 'sponge': option arms is 3; wanted tuple, as in (1, 2)"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_words(sponges: Registry[Any], given: dict[str, Any], complaint: str):
    with pytest.raises(ValueError) as refused:
        sponges.make("sponge", given)
    assert str(refused.value) == complaint


def test_a_member_without_options_says_so(sponges: Registry[Any]):
    sponges.register("stone")(dataclass(frozen=True, kw_only=True)(type("Stone", (), {})))
    with pytest.raises(ValueError, match="animal 'stone' has no option 'cells'; it has none"):
        sponges.make("stone", {"cells": 3})


def test_resolving_writes_every_option_out_as_json(sponges: Registry[Any]):
    resolved = sponges.resolve("sponge", {"cells": 9})
    assert resolved == {"cells": 9, "pores": 0.5, "colour": "yellow", "alive": True, "arms": [1, 2], "limit": None}
    assert json.loads(json.dumps(resolved)) == resolved
    assert sponges.resolve("sponge", resolved) == resolved


@pytest.mark.parametrize(("registry", "name"), MEMBERS, ids=[f"{registry.kind}-{name}" for registry, name in MEMBERS])
def test_every_member_is_a_frozen_dataclass_that_stands_without_options(registry: Registry[Any], name: str):
    member: Any = registry[name]
    assert dataclasses.is_dataclass(member)
    assert member.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(member))
    assert registry.make(name, registry.resolve(name)) == registry.make(name)


@pytest.mark.parametrize("registry", [BLOCKS, FRONTENDS, DATASETS, GRIDS], ids=lambda registry: registry.kind)
def test_every_registry_of_the_project_has_members(registry: Registry[Any]):
    assert len(registry.names()) >= 2
