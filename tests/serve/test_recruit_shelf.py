"""Experts of a pool that many ask at once: what is held stays, what waits comes in turn, memory is kept."""

import asyncio

import pytest

from coterie.errors import CoterieError
from coterie.serve.shelf import Shelf
from coterie.serve.worker import Worker
from coterie.settings.groups import ExpertServingSettings
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings
from test_scheduler import Machine, new_scheduler


def used(machine, scheduler, names):
    """Hold experts, all wanted at once, for two turns of the loop each; tell in which order they came in."""
    order = []

    async def use(shelf, name):
        async with shelf.holding(name):
            order.append(name)
            for _ in range(2):
                assert name in machine.held and shelf.load.running >= 1
                await asyncio.sleep(0.01)

    async def all_of_them():
        with Worker() as worker:
            shelf = Shelf(scheduler, worker, concurrency=1)
            found = await asyncio.gather(*(use(shelf, name) for name in names), return_exceptions=True)
            assert shelf.load[:2] == (0, 0)
            return found

    return order, asyncio.run(all_of_them())


def test_models_that_do_not_fit_together_take_turns_and_each_serves_all_who_wait_for_it():
    machine = Machine()
    scheduler = new_scheduler(*(machine.group(name, 6) for name in "abc"), budget=10)
    assert used(machine, scheduler, "abacbab")[0] == [*"abbbaac"]  # the first one came in before anybody waited
    assert machine.loaded == ["a", "b", "a", "c"] and machine.most == 6


def test_models_that_fit_together_are_held_together():
    machine = Machine()
    scheduler = new_scheduler(*(machine.group(name, 5) for name in "ab"), machine.group("c", 10), budget=10)
    order = used(machine, scheduler, "abcab")[0]
    assert (sorted(order[:2]), order[2], sorted(order[3:])) == ([*"ab"], "c", [*"ab"])
    assert machine.loaded == [*"abcab"] and machine.most == 10


def test_one_whose_memory_nobody_knows_is_alone_and_one_that_never_fits_is_refused():
    machine = Machine()
    groups = [machine.group("a", 5), machine.group("unknown", None), machine.group("huge", 11)]
    order, found = used(machine, new_scheduler(*groups, budget=10), ["a", "unknown", "huge", "a"])
    assert order == ["a", "unknown", "a"] and machine.most <= 10
    assert isinstance(found[2], CoterieError) and "huge needs about" in str(found[2])


def test_whoever_gives_up_leaves_the_turn_to_the_next():
    machine = Machine()
    scheduler = new_scheduler(*(machine.group(name, 6) for name in "ab"), budget=10)

    async def main():
        with Worker() as worker:
            shelf = Shelf(scheduler, worker, concurrency=1)
            first, second, third = (shelf.holding(name) for name in "aba")
            await first.__aenter__()
            waiting, behind = (asyncio.create_task(one.__aenter__()) for one in (second, third))
            await asyncio.sleep(0.01)
            assert shelf.load[:2] == (2, 1)  # the third lets the second, who came before, have its turn
            waiting.cancel()
            await asyncio.wait([waiting, behind])
            assert waiting.cancelled() and shelf.load[:2] == (0, 2)
            for one in (first, third):
                await one.__aexit__(None, None, None)
            assert shelf.load[:2] == (0, 0)

    asyncio.run(main())
    assert machine.loaded == ["a"]


def test_flags_of_recruited_experts_mean_what_they_mean_elsewhere():
    told = {"concurrency": 2, "requests_per_minute": 60, "retries": 0}
    settings = from_flat(ServeSettings, {"mixtures": ["x"], "expert_memory": 1.5, "expert_timeout": 9.0, **told})
    assert settings.recruited.serving == ExpertServingSettings(memory=1.5, timeout=9.0, **told)
    assert ServeSettings(mixtures=["x"]).recruited.serving == ExpertServingSettings()


@pytest.mark.parametrize("value", [{"concurrency": 0}, {"expert_timeout": 0}, {"retries": -1}])
def test_flags_that_mean_nothing_are_refused(value):
    with pytest.raises(CoterieError, match=next(iter(value)).replace("_", "[-_]")):
        from_flat(ServeSettings, {"mixtures": ["x"], **value})
