"""Model ids: mixtures, methods, experts and base models, each under the names that clients give them."""

import shutil

import pytest

from coterie.errors import CoterieError
from coterie.serve.app import run_server
from coterie.serve.catalogue import Catalogue, UnknownModel
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings


def catalogue(*mixtures: str, **options: object) -> Catalogue:
    made = Catalogue(from_flat(ServeSettings, {"mixtures": list(mixtures), "device": "cpu", **options}))
    made.load_all()
    return made


@pytest.fixture(scope="module")
def two(run_folder, tmp_path_factory) -> Catalogue:
    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(run_folder, other)
    return catalogue(f"first={run_folder}", str(other))


def test_one_mixture_has_its_methods_its_experts_and_its_base_model(run_folder, mixture):
    made = catalogue(f"own={run_folder}")
    ids, experts = [cell.id for cell in made.listed], list(mixture.bank.names)
    methods = [name for name in ids if name.startswith("own:")]
    assert ids == ["tiny", "own", *methods, *experts]
    assert {"own:moe-routing", "own:self-consistency", "own:uniform-weights"} <= set(methods)
    assert not {"own:oracle", "own:per-dataset", "own:mole", "own:elrea", "own:backbone", "own:base"} & set(methods)
    assert [cell.parent for cell in made.listed] == [None, *["tiny"] * (len(ids) - 1)]
    for expert in experts:
        assert made.resolve(expert) is made.resolve(f"tiny:{expert}") is made.resolve(f"own:{expert}")
    assert made.resolve("own:elrea") is made.resolve("own") and made.resolve("own:backbone") is made.resolve("tiny")


def test_experts_whose_names_collide_are_called_after_their_mixtures(two, mixture):
    ids = [cell.id for cell in two.listed]
    for expert in mixture.bank.names:
        assert {f"first:{expert}", f"copy:{expert}"} <= set(ids) and expert not in ids
        with pytest.raises(UnknownModel, match=f"no model is called '{expert}'"):
            two.resolve(expert)
    assert ids.count("tiny") == 1 and ids[0] == "tiny"


def test_mixtures_of_the_same_base_model_share_it(two):
    first, second = two.desks
    assert first.grid.own.backbone is second.grid.own.backbone and first.engine is not second.engine


def test_what_is_removed_is_gone_and_what_is_loaded_anew_answers_from_then_on(run_folder):
    made = catalogue(f"own={run_folder}")
    before = made.resolve("own")
    made.load("own", str(run_folder))
    assert made.resolve("own").desk is not before.desk and len(made.desks) == 1
    made.remove("own")
    assert made.listed == [] and made.desks == ()


def test_methods_may_be_named_and_what_they_need_must_be_there(grid_folder, run_folder):
    made = catalogue(f"own={grid_folder}", methods="loss-routing,best-single")
    assert [cell.id for cell in made.listed if ":" in cell.id] == ["own:loss-routing", "own:best-single"]
    with pytest.raises(CoterieError, match="coterie train-extras"):
        catalogue(f"own={run_folder}", methods="loss-routing")


def test_a_folder_that_is_none_is_told_before_anything_listens(run_folder, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.serve.app.listening", lambda _: pytest.fail("it listens"))
    for folder, words in ((tmp_path / "none", "there is no mixture folder"), (model_folder, "is a base model, not")):
        with pytest.raises(CoterieError, match=words):
            run_server(mixtures=[str(run_folder), f"own={folder}"])


@pytest.mark.parametrize("names", [["a=x", "a=y"], ["=x"], ["a:b=x"], ["a/b=x"]])
def test_a_name_must_be_one_of_its_own(names):
    with pytest.raises(CoterieError, match="NAME=FOLDER"):
        catalogue(*names)
