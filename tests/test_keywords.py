"""Every public function that takes settings takes their names too, and lists of names never become letters."""

import importlib
import inspect
import json

import pytest

import coterie
from coterie import methods
from coterie.errors import CoterieError
from coterie.experts.bank_folder import open_bank
from coterie.methods import load_grid, make_grid
from coterie.routers.fixed import uniform
from coterie.settings.commands import BankAddSettings, ElreaSettings, EvaluationSettings
from coterie.settings.groups import ModelSettings, SamplingSettings
from coterie.settings.keywords import names_in, takes_fields
from coterie.settings.reading import Settings, from_flat

PUBLIC = {
    **{name: getattr(coterie, name) for name in coterie.__all__ if name != "methods"},
    **{f"methods.{name}": getattr(methods, name) for name in methods.__all__},
}


def settings_of(function) -> list[inspect.Parameter]:
    """The parameters of a function that are settings objects."""
    if not inspect.isfunction(function):
        return []
    found = inspect.signature(function, eval_str=True).parameters.values()
    kinds = {p.name: [p.annotation, *getattr(p.annotation, "__args__", ())] for p in found}
    return [p for p in found if any(isinstance(kind, type) and issubclass(kind, Settings) for kind in kinds[p.name])]


TAKES = {name: function for name, function in PUBLIC.items() if settings_of(function)}


@pytest.mark.parametrize("name", TAKES)
def test_a_settings_object_is_never_needed(name, mixture):
    function = TAKES[name]
    [settings] = settings_of(function)
    others = [p for p in inspect.signature(function).parameters.values() if p.name != settings.name]
    needed = [p for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if name in ("methods.generate_symbolic", "methods.plan_symbolic"):
        needed = []  # its prompts come after the mixture
    given = [mixture if p.name == "mixture" else "x" for p in needed]
    with pytest.raises(CoterieError, match="no setting is called 'no_such_setting'"):
        function(*given, no_such_setting=1)


def test_the_functions_with_settings_are_those_that_are_known():
    assert {"load_backbone", "load_examples", "evaluate_folder", "methods.fit_elrea", "methods.make_grid"} <= set(TAKES)
    assert len(TAKES) >= 18


def test_what_comes_first_is_the_first_setting(model_folder, tmp_path):
    backbone = coterie.load_backbone(model_folder, device="cpu")
    assert backbone.identity == coterie.load_backbone(model=str(model_folder), dtype="float32", device="cpu").identity
    assert backbone.identity == coterie.load_backbone(ModelSettings(model=str(model_folder), device="cpu")).identity
    assert list(coterie.init_pool(tmp_path / "experts", expert=f"a={model_folder}").names) == ["a"]
    with pytest.raises(CoterieError, match="Did you mean 'device'"):
        coterie.load_backbone("m", devise="cpu")
    with pytest.raises(CoterieError, match="--data: field required"):
        coterie.evaluate_folder("runs/x", output="y")


def test_the_functions_own_arguments_stay_apart_from_settings():
    seen = []

    @takes_fields(EvaluationSettings)
    def call(settings: EvaluationSettings, given: list[int] | None = None) -> None:
        seen.append((settings, given))

    call("m", [1], data="d", output="o")
    call(mixture="m", data=["d"], output="o", given=[1])
    call(from_flat(EvaluationSettings, {"mixture": "m", "data": ["d"], "output": "o"}), given=[1])
    assert seen[0] == seen[1] == seen[2] and seen[0][1] == [1]


def test_one_text_where_a_list_is_wanted_is_one_text(mixture, grid_folder, tmp_path):
    assert names_in("uniform") == ["uniform"] and names_in("a, b,a") == names_in(("a", "b")) == ["a", "b"]
    assert set(load_grid(mixture, "uniform-weights").cell("uniform-weights").router.weights) == set(mixture.bank.names)
    assert make_grid(mixture, "elrea,uniform-weights", encoder="hidden").extras == {}
    with pytest.raises(CoterieError, match="Did you mean 'encoder'"):
        make_grid(mixture, "elrea", encodr="hidden")
    assert uniform("base").weights == {"base": 1.0}
    assert from_flat(SamplingSettings, {"stop": "end"}).stop == ["end"]
    assert from_flat(BankAddSettings, {"folder": "b", "adapters": "x"}).adapters == ["x"]
    assert ElreaSettings(model=ModelSettings(model="m"), data="train.jsonl", output="o").data == ["train.jsonl"]
    (tmp_path / "bank").mkdir()
    rewritten = {"format": 1, "base_model": {"id": "m", "revision": None, "sha256": "x"}}
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(rewritten))
    with pytest.raises(CoterieError, match="no adapter is called 'spell'"):
        open_bank(tmp_path / "bank", "spell")


def test_help_says_that_the_names_will_do():
    for name, function in TAKES.items():
        module = importlib.import_module(function.__module__)
        assert getattr(module, function.__name__) is function
        if list(inspect.signature(function).parameters)[0] == "settings":
            assert "Instead of settings: " in (function.__doc__ or ""), name
