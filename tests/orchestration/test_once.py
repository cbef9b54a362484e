"""One thing made once, whoever dies or races."""

import threading
import uuid

import pytest

from helix.storage import Storage
from orchestration.once import made_once, recorded


class Service:
    """Makes things under names of its own and never asks whether there is one already."""

    def __init__(self):
        self.things: dict[str, bool] = {}
        self.before_making = lambda: None

    def make(self) -> str:
        self.before_making()
        name = uuid.uuid4().hex
        self.things[name] = True
        return name

    def remove(self, name: str) -> None:
        self.things[name] = False

    def lives(self, name: str) -> bool:
        return self.things.get(name, False)

    def find(self) -> str | None:
        return min(self.alive, default=None)

    @property
    def alive(self) -> list[str]:
        return [name for name, alive in self.things.items() if alive]

    def ask(self, storage: Storage) -> str:
        return made_once(
            storage, "database/thing", find=self.find, make=self.make, remove=self.remove, lives=self.lives
        )


def test_what_is_asked_for_again_is_the_same(storage: Storage):
    service = Service()
    assert service.ask(storage) == service.ask(storage)
    assert len(service.things) == 1


@pytest.mark.parametrize("count", [2, 8])
def test_many_at_once_end_with_one_and_agree_on_it(storage: Storage, count: int):
    service, barrier, got = Service(), threading.Barrier(count), []
    service.before_making = barrier.wait  # all of them have looked and found nothing
    threads = [threading.Thread(target=lambda: got.append(service.ask(storage))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(service.things) == count
    assert got == [service.alive[0]] * count
    assert len(service.alive) == 1


def test_what_a_process_made_before_it_died_is_found_and_not_made_again(storage: Storage):
    service = Service()
    orphan = service.make()
    assert recorded(storage, "database/thing") is None
    assert service.ask(storage) == orphan
    assert service.ask(storage) == orphan
    assert len(service.things) == 1


def test_what_was_removed_by_hand_is_made_again_once(storage: Storage):
    service = Service()
    first = service.ask(storage)
    service.remove(first)
    second = service.ask(storage)
    assert second != first
    assert service.ask(storage) == second
    assert service.alive == [second]


def test_two_databases_do_not_share_what_they_made(storage: Storage):
    one, other = Service(), Service()
    hands = [{"find": s.find, "make": s.make, "remove": s.remove, "lives": s.lives} for s in (one, other)]
    assert made_once(storage, "a/thing", **hands[0]) != made_once(storage, "b/thing", **hands[1])


@pytest.mark.parametrize("said", [b"{", b"[]", b"{}", b'{"made": 1}'])
def test_a_damaged_record_makes_nothing_twice(storage: Storage, said: bytes):
    service = Service()
    name = service.ask(storage)
    (record,) = storage.children("tracking/database/thing")
    storage.put(f"tracking/database/thing/{record}", said)
    storage.put("tracking/database/thing/notes.txt", b"no record")
    assert recorded(storage, "database/thing") is None
    assert service.ask(storage) == name == recorded(storage, "database/thing")
    assert len(service.things) == 1
