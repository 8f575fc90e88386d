"""All families of methods: what `coterie methods` lists, and what the methods of a mixture's family need."""

from collections.abc import Sequence
from typing import Any

from coterie import ranks
from coterie.errors import CoterieError
from coterie.methods.elrea.methods import FAMILY as ELREA
from coterie.methods.extras import Extra, extra_folder, load_extra
from coterie.methods.family import Family, MethodGrid
from coterie.methods.kshot.methods import FAMILY as KSHOT
from coterie.methods.symbolic.methods import FAMILY as SYMBOLIC
from coterie.methods.token_level.methods import FAMILY as TOKEN_LEVEL
from coterie.mixture import Mixture
from coterie.settings.commands import TrainExtrasSettings
from coterie.settings.groups import ExtrasSettings
from coterie.settings.keywords import names_in, takes_fields
from coterie.settings.reading import from_flat

FAMILIES: dict[str, Family] = {family.name: family for family in (ELREA, TOKEN_LEVEL, KSHOT, SYMBOLIC)}
"""By what was fitted."""


def family_of(mixture: Mixture) -> Family:
    """Return the family whose methods work on a mixture.

    Raises:
        CoterieError: when none is known for it.
    """
    for family in FAMILIES.values():
        if mixture.method in (family.name, *family.also_fitted):
            return family
    raise CoterieError(
        f"nothing is known to compare with {mixture.method!r}; give a folder made by {' or '.join(FAMILIES)}"
    )


def make_grid(
    mixture: Mixture,
    names: str | Sequence[str],
    settings: ExtrasSettings | None = None,
    **extras: Any,  # noqa: ANN401 - fields of ExtrasSettings
) -> MethodGrid:
    """Train what these methods still lack, once, into the user's cache, and load it.

    Args:
        mixture: a fitted mixture.
        names: of methods, in a list or with commas between them.
        settings: how what lacks is trained.
        **extras: the same by name, such as encoder="hidden".

    Raises:
        CoterieError: for an unknown method or keyword, or when something cannot be trained.
    """
    family = family_of(mixture)
    how = from_flat(ExtrasSettings, extras) if settings is None else settings
    return MethodGrid(mixture, family.prepare(mixture, names_in(names), how), family)


def load_grid(mixture: Mixture, names: str | Sequence[str]) -> MethodGrid:
    """Load what these methods need, named in a list or with commas between them; nothing is trained.

    Raises:
        CoterieError: for an unknown method, or when something was not trained yet.
    """
    family, names = family_of(mixture), names_in(names)
    needed = family.needs(names)
    for name in needed:
        if mixture.folder is None or not extra_folder(mixture, name).is_dir():
            methods = ",".join(names)
            raise CoterieError(
                f"{methods} needs {name}, which was not trained yet; "
                f"type: coterie train-extras {mixture.folder} --methods {methods}"
            )
    return MethodGrid(mixture, {name: load_extra(mixture, name) for name in needed}, family)


@takes_fields(TrainExtrasSettings)
@ranks.joined()
def train_extras(settings: TrainExtrasSettings) -> dict[str, Extra]:
    """Train what methods need beyond a fitted run, once, into the run's folder; return all of it by name.

    Several processes that were launched together share the work.

    Raises:
        CoterieError: for an unknown method, what was trained with other settings already, or what cannot be trained.
    """
    mixture = ranks.each(lambda: Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump()))
    family = family_of(mixture)
    everything = settings.methods == "all"
    names = family.available(mixture) if everything else names_in(settings.methods)
    return family.prepare(mixture, names, settings.extras, in_run=True)


def listed() -> list[dict[str, Any]]:
    """Return every method as a row of the table, with the fitted run it works on, what it trains, and its paper."""
    return [
        {"on": family.name, "method": name, "bank": m.bank, "router": m.router, "combiner": m.combiner}
        | {"trains": list(m.needs), "paper": m.paper}
        for family in FAMILIES.values()
        for name, m in family.methods.items()
    ]
