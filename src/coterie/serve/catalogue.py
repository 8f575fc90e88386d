"""The catalogue: what each model id of the API answers as."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from coterie.engine.engine import Engine
from coterie.errors import CoterieError, unknown_name
from coterie.experts.names import BACKBONE
from coterie.methods.family import MethodGrid
from coterie.methods.registry import family_of
from coterie.mixture import Mixture
from coterie.routers.fixed import one_hot
from coterie.settings.serving import CapacitySettings, ServeSettings

GIB = 2**30


@dataclass(frozen=True, eq=False)
class Desk:
    """A loaded mixture with the engine that answers all that is asked of it, its experts and its base model.

    Attributes:
        name: the mixture's id.
        own: the mixture as it was fitted.
        mixture: the same with the untouched base model in its bank, as an expert that changes nothing.
        engine: answers requests to all of its cells.
        loaded: when, in seconds since 1970.
    """

    name: str
    own: Mixture
    mixture: Mixture
    engine: Engine
    loaded: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def cells(self) -> "dict[str, Cell]":
        """What answers, by the ids that a client may give; the first id of each is the one that is listed."""
        base, names = self.own.backbone.identity.id, self.mixture.bank.names
        cells = [Cell(base, self, self.mixture.replace(router=one_hot(BACKBONE, names), combiner="layers"))]
        cells.append(Cell(self.name, self, self.mixture, base))
        experts = [name for name in self.own.bank.names if name != BACKBONE]
        singles = [Cell(name, self, self.mixture.replace(router=name, combiner="layers"), base) for name in experts]
        return {cell.id: cell for cell in [*cells, *singles]}


@dataclass(frozen=True, eq=False)
class Cell:
    """What a model id stands for.

    Attributes:
        id: as it is listed.
        desk: whose engine answers.
        mixture: as what.
        parent: id of the base model; None for itself.
    """

    id: str
    desk: Desk
    mixture: Mixture
    parent: str | None = None


class UnknownModel(CoterieError):
    """No model has the id that was asked for."""


class Catalogue:
    """Model ids, and what answers to each."""

    def __init__(self, settings: ServeSettings) -> None:
        """Load the mixtures that are to be served.

        Raises:
            CoterieError: as `Mixture.from_pretrained`, or for a name that is given twice.
        """
        self.settings = settings
        self._desks: dict[str, Desk] = {}
        for text in settings.mixtures:
            name, source = named(text)
            if name in self._desks:
                raise CoterieError(f"two mixtures are called {name!r}; give one as NAME=FOLDER")
            mixture = Mixture.from_pretrained(source, **settings.placement.model_dump())
            self._desks[name] = open_desk(name, mixture, settings.capacity)

    def __iter__(self) -> Iterator[Cell]:
        """Yield what is listed, base models first."""
        cells = [cell for desk in self._desks.values() for cell in desk.cells.values()]
        yield from sorted(cells, key=lambda cell: cell.parent is not None)

    def resolve(self, name: str) -> Cell:
        """Return what a model id stands for.

        Raises:
            UnknownModel: when nothing does.
        """
        cells = {cell.id: cell for cell in self}
        if name not in cells:
            raise UnknownModel(str(unknown_name("model", name, cells)))
        return cells[name]


def named(text: str) -> tuple[str, str]:
    """Read NAME=FOLDER, or a folder, whose own name is taken then."""
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).resolve().name, text)


def open_desk(name: str, mixture: Mixture, capacity: CapacitySettings) -> Desk:
    """Get a mixture ready for requests."""
    everything = MethodGrid(mixture, {}, family_of(mixture)).mixture
    budget = None if capacity.cache_memory is None else int(capacity.cache_memory * GIB)
    prefixes = int(capacity.prefix_memory * GIB)
    return Desk(name, mixture, everything, everything.engine(places=capacity.places, budget=budget, prefixes=prefixes))
