"""Of a bank's adapters, those beyond a number of bytes are read when they are asked for."""

import pytest

from coterie.errors import CoterieError
from coterie.experts import bank
from coterie.experts.bank import StoredAdapters
from coterie.mixture import Mixture
from helpers import adapters_alive, close, same_answers

PROMPTS = ["add 3 4", "SPELL ABCD NOW"]


@pytest.fixture
def most_alive(monkeypatch) -> list[int]:
    """No adapter stays in memory; how many there were, each time that one was read."""
    monkeypatch.setattr(bank, "HELD_BYTES", 0)
    return adapters_alive(monkeypatch)


def test_a_mixture_is_loaded_and_routes_with_one_adapter_at_a_time_in_memory(run_folder, mixture, most_alive):
    """The one before is let go when the next one was read."""
    stored = Mixture.from_pretrained(run_folder, device="cpu")
    assert len(stored.bank) == 4 and max(most_alive) == 2
    routed = len(most_alive)
    close(stored.route(PROMPTS).weights, mixture.route(PROMPTS).weights)
    assert len(most_alive) == routed  # none was read again


@pytest.mark.parametrize("combiner", ["logits", "layers", "weights:svd"])
def test_answers_are_those_of_adapters_in_memory(run_folder, mixture, most_alive, combiner):
    stored = Mixture.from_pretrained(run_folder, device="cpu").replace(combiner=combiner)
    wanted = mixture.replace(combiner=combiner).generate(PROMPTS, max_new_tokens=3)
    same_answers(stored.generate(PROMPTS, max_new_tokens=3), wanted)


def test_as_many_stay_in_memory_as_there_is_room_for(run_folder, mixture, monkeypatch):
    folders = [run_folder / "experts" / name for name in mixture.bank.names]
    one = sum(half.nbytes for pair in mixture.bank.adapters[0].values() for half in pair[:2])
    monkeypatch.setattr(bank, "HELD_BYTES", 2 * one)
    stored = StoredAdapters(folders, mixture.backbone.model)
    assert [stored[n] is stored[n] for n in range(4)] == [True, True, False, False]
    assert len(stored[1:]) == 3 and stored[-1].keys() == mixture.bank.adapters[3].keys()


def test_a_broken_adapter_is_told_when_the_bank_is_opened(run_folder, mixture, most_alive, tmp_path):
    with pytest.raises(CoterieError, match="adapter_config.json"):
        StoredAdapters([run_folder / "experts" / "base", tmp_path], mixture.backbone.model)
