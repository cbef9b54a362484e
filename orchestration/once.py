"""One thing made once by processes that do not know of each other, in a service that has no "create if absent".

    tracking/<database>/<key>/000001.json    {"made": the name that the service gave it}

Whoever needs the thing makes it and then puts its name, if nobody has: the first put counts, and who comes second
removes what it made. A process that dies between the two leaves a thing without a record, which the next one finds and
records. What was removed by hand since is made again under the next number.
"""

import re
from collections.abc import Callable

from helix.storage import CorruptObjectError, Storage, json_bytes

#: Where the names of what was made are kept.
FOLDER = "tracking"


def made_once(
    storage: Storage,
    key: str,
    *,
    find: Callable[[], str | None],
    make: Callable[[], str],
    remove: Callable[[str], None],
    lives: Callable[[str], bool],
) -> str:
    """The name of the thing `key`, made now if there is none.

    `find`: the name of one that somebody made, recorded or not; `lives`: whether the one of this name is still there.
    """
    folder = f"{FOLDER}/{key}"
    while True:
        name = recorded(storage, key)
        if name is not None and lives(name):
            return name
        number = _newest(storage, folder) + 1
        found = find()
        mine = found or make()
        if storage.put_if_absent(f"{folder}/{number:06d}.json", json_bytes({"made": mine})):
            return mine
        if found is None and recorded(storage, key) != mine:
            remove(mine)


def recorded(storage: Storage, key: str) -> str | None:
    """The name that is recorded last for `key`."""
    folder = f"{FOLDER}/{key}"
    number = _newest(storage, folder)
    try:
        said = storage.get_json(f"{folder}/{number:06d}.json") if number else None
    except CorruptObjectError:  # what was made is then found by what it is
        return None
    made = said.get("made") if isinstance(said, dict) else None
    return made if isinstance(made, str) else None


def _newest(storage: Storage, folder: str) -> int:
    names = storage.children(folder)
    return max((int(name[:-5]) for name in names if re.fullmatch(r"\d+\.json", name)), default=0)
