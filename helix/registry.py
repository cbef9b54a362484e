"""Name -> member. A registry scans its folder on first use, so dropping in a file is the whole of adding a member."""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

Member = TypeVar("Member")


class Registry(Generic[Member]):
    """The members of one kind, each registered by the file that defines it.

    `kind` is the word used in error messages. `package` is the plural folder (or the single module) that holds the
    members; it is imported on first look-up and not before, so that naming a registry costs nothing. `least` is the
    smallest whole number that an option of its members may be.
    """

    def __init__(self, kind: str, package: str, *, least: int = 0):
        self.kind, self.package, self.least = kind, package, least
        self._members: dict[str, Member] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator: makes the class (or object) known as `name`. Two different members of one name are an error."""

        def add(member: Any) -> Any:
            known = self._members.get(name)
            if known is not None and known != member and _origin(known) != _origin(member):
                raise ValueError(
                    f"two members are called {self.kind} {name!r}: {_origin(known)} and {_origin(member)}; rename one"
                )
            self._members[name] = member
            return member

        return add

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        self._scan()
        return tuple(sorted(self._members))

    def __getitem__(self, name: str) -> Member:
        self._scan()
        if name not in self._members:
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        return self._members[name]

    def resolve(self, name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All options of a member as plain JSON values: those given, and its defaults for the rest."""
        return json.loads(json.dumps(dataclasses.asdict(self.make(name, options))))

    def make(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """The member `name`, a frozen dataclass, with `options` as its fields. Unknown options and wrong types fail."""
        member: Any = self[name]
        fields = {field.name: field for field in dataclasses.fields(member)}
        given = dict(options or {})
        for key, value in given.items():
            if key not in fields:
                known = ", ".join(fields) or "none"
                raise ValueError(f"{self.kind} {name!r} has no option {key!r}; it has {known}")
            default = fields[key].default
            if isinstance(default, tuple) and isinstance(value, list | tuple):
                given[key] = tuple(value)
            elif isinstance(default, float) and type(value) is int:
                given[key] = float(value)
            elif default is not dataclasses.MISSING and default is not None and type(value) is not type(default):
                raise ValueError(
                    f"{self.kind} {name!r}: option {key} is {value!r}; wanted {type(default).__name__}, "
                    f"as in {default!r}"
                )
        made = member(**given)
        for key in fields:
            value = getattr(made, key)
            if type(value) is int and value < self.least:
                raise ValueError(f"{self.kind} {name!r}: option {key} is {value}; wanted {self.least} or more")
        return made

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        try:
            package = importlib.import_module(self.package)
            for info in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{self.package}.{info.name}")
        except BaseException:
            self._scanned = False
            raise


def _origin(member: Any) -> str:
    """Where a class was defined, so that one file that is imported twice counts once; of an object, what it is."""
    if isinstance(member, type):
        return f"{member.__module__}.{member.__qualname__}"
    return f"a {type(member).__name__} (object {id(member)})"


BLOCKS: Registry[Any] = Registry("block", "helix.models.blocks", least=1)
FRONTENDS: Registry[Any] = Registry("frontend", "helix.models.frontend", least=1)
DATASETS: Registry[Any] = Registry("data set", "helix.data.datasets")
GRIDS: Registry[Any] = Registry("grid", "orchestration.grids")
STORAGES: Registry[Any] = Registry("storage", "helix.storage_s3")
BENCHES: Registry[Any] = Registry("bench", "helix.benches")
CHECKS: Registry[Any] = Registry("check", "helix.checks")
