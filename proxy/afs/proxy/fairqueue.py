"""The order in which runs that wait get room. Plain data, no clock of its own, no awaits.

Priority first: runs of the highest class come before all others. A class that gets nothing ages: for each *ageing* seconds
it counts as one level higher, until one of its runs is dispatched; so a class that is lower by N gets at least one run in
N * *ageing* seconds, and ageing never decides between runs of one class. Within a class the tenant that has the least in use
comes first, and of those with the same the one whose turn is longest ago. Within a tenant it is first come, first served.

A run that does not fit lets those behind it pass; :meth:`FairQueue.starved` tells who was passed for too long. Runs that want
the same (``Entry.shape``) fit or do not fit together, so of each tenant only the first of each shape is looked at.

A turn counts from the moment that a run is dispatched, but not if its node refuses it: what the run then waits for again
must not be put off by offers that came to nothing.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from afs.afslet.requests import Resources

Shape = tuple[Resources, str]


@dataclass(slots=True, eq=False)
class Entry:
    """A run that waits. *number* is its place in the order of arrival, *since* when it came."""

    wanted: Resources
    tenant: str = ""
    priority: int = 0
    node_id: str = ""
    number: int = 0
    since: float = 0.0
    passed_since: float = math.inf  # when a later run was first dispatched although this one waited
    aged_since: float = math.inf  # when its class had got something last, before this one was taken out

    @property
    def shape(self) -> Shape:
        """What decides where it fits."""
        return self.wanted, self.node_id


@dataclass(slots=True)
class _Tenant:
    shapes: dict[Shape, deque[Entry]] = field(default_factory=dict)
    count: int = 0

    def heads(self) -> list[Entry]:
        if len(self.shapes) == 1:
            return [entries[0] for entries in self.shapes.values()]
        return sorted((entries[0] for entries in self.shapes.values()), key=lambda entry: entry.number)


@dataclass(slots=True)
class _Class:
    served_at: float
    tenants: dict[str, _Tenant] = field(default_factory=dict)


_Number = TypeVar("_Number", int, float)


def _last(given: dict[Entry, _Number] | None, before: _Number) -> _Number:
    """The last of the numbers that were *given* in rising order, or the one from *before* if that is larger."""
    return max(next(reversed(given.values())), before) if given else before


def _take(given: dict[Any, dict[Entry, _Number]], key: object, entry: Entry) -> _Number | None:
    """Take out the number of *entry*, if it has one."""
    found = given.get(key, {})
    number = found.pop(entry, None)
    if not found:
        given.pop(key, None)
    return number


class FairQueue:
    """*ageing* in seconds per level of priority; 0: classes do not age."""

    def __init__(self, ageing: float) -> None:
        self._ageing = ageing
        self._classes: dict[int, _Class] = {}
        self._turns: dict[str, int] = {}  # by tenant: when it was last served, as a number
        # What was dispatched and has not left, in that order, by tenant and by class: any of it may still be refused.
        self._turns_given: dict[str, dict[Entry, int]] = {}
        self._served_given: dict[int, dict[Entry, float]] = {}
        self._counter = itertools.count(1)
        self._full: set[Shape] = set()  # what did not fit since room was last freed
        self._passed: set[Entry] = set()
        self.counts: dict[str, int] = {}  # how many wait, by tenant
        self.length = 0

    def add(self, entry: Entry, now: float) -> None:
        """Queue it: behind the others of its kind, or where its number says if it was queued before."""
        entry.number = entry.number or next(self._counter)
        level = self._classes.setdefault(entry.priority, _Class(min(now, entry.aged_since)))
        tenant = level.tenants.setdefault(entry.tenant, _Tenant())
        entries = tenant.shapes.setdefault(entry.shape, deque())
        at = len(entries)
        while at and entries[at - 1].number > entry.number:
            at -= 1
        entries.insert(at, entry)
        tenant.count += 1
        self.counts[entry.tenant] = self.counts.get(entry.tenant, 0) + 1
        self.length += 1

    def remove(self, entry: Entry) -> None:
        """Take it out, whether its turn has come or not."""
        level = self._classes[entry.priority]
        entry.aged_since = level.served_at
        tenant = level.tenants[entry.tenant]
        entries = tenant.shapes[entry.shape]
        if entries[0] is entry:
            entries.popleft()
        else:
            entries.remove(entry)
        tenant.count -= 1
        if not entries:
            del tenant.shapes[entry.shape]
            if not tenant.shapes:
                del level.tenants[entry.tenant]
                if not level.tenants:
                    del self._classes[entry.priority]
        self._passed.discard(entry)
        self.length -= 1
        self.counts[entry.tenant] -= 1
        if not self.counts[entry.tenant]:
            del self.counts[entry.tenant]

    def room_freed(self) -> None:
        """What did not fit may fit now."""
        self._full.clear()

    def may_fit(self, entry: Entry) -> bool:
        """Whether looking for room for *entry* makes sense."""
        return entry.shape not in self._full

    def next(self, fits: Callable[[Entry], bool], usage: Callable[[str], float], now: float) -> Entry | None:
        """The first run that fits, which is taken out; None if none does."""
        waiting: list[Entry] = []
        for entry in self._in_order(usage, now):
            if entry.shape in self._full:
                waiting.append(entry)
            elif not fits(entry):
                self._full.add(entry.shape)
                waiting.append(entry)
            else:
                for each in waiting:
                    each.passed_since = min(each.passed_since, now)
                self._passed.update(waiting)
                self.remove(entry)
                self.served(entry, now)
                return entry
        return None

    def served(self, entry: Entry, now: float) -> None:
        """It is its tenant's last turn, and its class's, until :meth:`refused`; or for good, by :meth:`left`."""
        self._turns_given.setdefault(entry.tenant, {})[entry] = next(self._counter)
        self._served_given.setdefault(entry.priority, {})[entry] = now

    def refused(self, entry: Entry) -> None:
        """As if it had not been served."""
        _take(self._turns_given, entry.tenant, entry)
        _take(self._served_given, entry.priority, entry)

    def left(self, entry: Entry) -> None:
        """It ended; if it was served, that stands."""
        turn = _take(self._turns_given, entry.tenant, entry)
        if turn is not None:
            self._turns[entry.tenant] = max(self._turns.get(entry.tenant, 0), turn)
        served_at = _take(self._served_given, entry.priority, entry)
        if served_at is not None and (level := self._classes.get(entry.priority)) is not None:
            level.served_at = max(level.served_at, served_at)

    def _turn(self, tenant: str) -> int:
        return _last(self._turns_given.get(tenant), self._turns.get(tenant, 0))

    def forget(self, tenant: str) -> None:
        """*tenant* has nothing here any more."""
        self._turns.pop(tenant, None)

    def starved(self, now: float, patience: float) -> Entry | None:
        """Of those that others have passed for *patience* seconds, the one that was first."""
        return min(
            (entry for entry in self._passed if now - entry.passed_since >= patience),
            key=lambda entry: (-entry.priority, entry.passed_since, entry.number),
            default=None,
        )

    def shapes(self) -> dict[Shape, Entry]:
        """Each shape that waits, with one of the runs that have it."""
        return {
            shape: entries[0]
            for level in self._classes.values()
            for tenant in level.tenants.values()
            for shape, entries in tenant.shapes.items()
        }

    def __iter__(self) -> Iterator[Entry]:
        for level in self._classes.values():
            for tenant in level.tenants.values():
                for entries in tenant.shapes.values():
                    yield from entries

    def positions(self) -> Iterator[tuple[Entry, int]]:
        """Everyone's place if all fitted and tenants took turns, 1 is next: an estimate."""
        place = 0
        for _, level in sorted(self._classes.items(), reverse=True):
            tenants = sorted(level.tenants.items(), key=lambda item: self._turn(item[0]))
            lines = [
                sorted((entry for entries in tenant.shapes.values() for entry in entries), key=lambda e: e.number)
                for _, tenant in tenants
            ]
            for row in itertools.zip_longest(*lines):
                for entry in row:
                    if entry is not None:
                        place += 1
                        yield entry, place

    def position(self, entry: Entry) -> int:
        """The place of *entry*, which came last, as :meth:`positions` tells it."""
        ahead = sum(
            tenant.count
            for priority, level in self._classes.items()
            if priority > entry.priority
            for tenant in level.tenants.values()
        )
        tenants = self._classes[entry.priority].tenants
        own = tenants[entry.tenant].count
        return ahead + sum(min(tenant.count, own) for tenant in tenants.values())

    def _in_order(self, usage: Callable[[str], float], now: float) -> Iterator[Entry]:
        for level in self._levels(now):
            tenants = level.tenants
            names = list(tenants)
            if len(names) > 1:
                names.sort(key=lambda name: (usage(name), self._turn(name)))
            for name in names:
                yield from tenants[name].heads()

    def _levels(self, now: float) -> list[_Class]:
        if len(self._classes) < 2:
            return list(self._classes.values())

        def key(item: tuple[int, _Class]) -> tuple[float, int]:
            served_at = _last(self._served_given.get(item[0]), item[1].served_at)
            age = (now - served_at) / self._ageing if self._ageing else 0.0
            return item[0] + age, item[0]

        return [level for _, level in sorted(self._classes.items(), key=key, reverse=True)]
