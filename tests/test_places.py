"""Every setting that names a place is known as one, so that nothing that is read is ever deleted."""

import pytest

from coterie.cli.table import COMMANDS
from coterie.settings import commands
from coterie.settings.places import READ, WRITTEN_IN_PLACE, sources, target
from coterie.settings.reading import flat_fields, from_flat

KINDS = list(dict.fromkeys(command.settings for command in COMMANDS.values() if command.settings))
NO_PLACES = {
    *("output", "device", "dtype", "revision", "target_modules", "system_prompt", "input_template", "ignore_fields"),
    *(
        "report_to",
        "blocks",
        "every",
        "router",
        "combiner",
        "method",
        "methods",
        "stop",
        "logit_bias",
        "control",
        "speculate",
    ),
    *(
        "repository",
        "licence",
        "base_model",
        "search",
        "host",
        "upstream",
        "cors_origin",
        "allowed_hosts",
        "metrics_names",
    ),
    *("skill_expert", "skill_list", "aggregator", "weights", "prompt", "merge", "map", "name", "names"),
}
"""Settings that are texts and name nothing that is read."""
PRINTS = ("route", "bank verify", "bank find", "push", "serve")
"""Commands that write nothing here."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.command)
def test_every_text_among_the_settings_is_a_place_that_is_read_or_known_to_be_none(kind):
    texts = {name for name, field, _ in flat_fields(kind) if "str" in str(field.annotation)}
    assert texts <= {*READ, *NO_PLACES}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.command)
def test_what_a_command_writes_is_one_of_its_settings_or_its_output(kind):
    names = {name for name, _, _ in flat_fields(kind)}
    assert WRITTEN_IN_PLACE.get(kind.command, "output") in names or kind.command in PRINTS


def test_places_are_found_in_groups_and_in_lists():
    values = {"model": "m", "data": ["a=x.jsonl", "b"], "output": "o", "encoder": "e"}
    settings = from_flat(commands.TokenLevelSettings, values)
    assert sources(settings) == {"model": ["m"], "data": ["a=x.jsonl", "b"], "encoder": ["e"]}
    assert target(settings) == "o"
    added = from_flat(commands.BankAddSettings, {"folder": "bank", "adapters": ["x"]})
    assert sources(added) == {"folder": ["bank"], "adapters": ["x"]} and target(added) == "bank"
