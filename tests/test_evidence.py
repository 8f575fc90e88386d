"""The evidence is made in steps that go on where they stopped, on rows that were not trained on."""

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from coterie.cli.table import COMMANDS
from coterie.evaluation.statistics import holm, sign_flip_test
from coterie.methods.elrea.methods import FAMILY as ELREA
from coterie.methods.kshot.methods import FAMILY as KSHOT
from coterie.methods.token_level.methods import FAMILY as TOKENS
from report_pages import records

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("evidence")
        for name in (
            "evidence",
            "evidence_rows",
            "evidence_picture",
            "evidence_steps",
            "evidence_tables",
            "domain_mix",
            "task_bank",
        ):
            sys.modules.pop(name, None)


@pytest.fixture
def rows_module(evidence):
    return sys.modules["evidence_rows"]


@pytest.fixture
def plan(tmp_path, evidence, rows_module):
    """Data of which each set has 40 short rows in each file, 20 of its test's questions in the training file too."""
    parts = [side for mix in rows_module.MIXES.values() for side in (mix.train, mix.inside, mix.outside)]
    files = {file for side in parts for file in side.values()} | {*rows_module.TARGETS.values(), *rows_module.POOL}
    files |= {*rows_module.SETS.values(), *(file for pair in rows_module.SKILLS.values() for file in pair)}
    for name, _, split in (file.partition("/") for file in files):
        first = 0 if split == "train" else 20
        rows = [
            {
                "id": f"{name}/{n}",
                "instruction": f"{name} {n}",
                "response": "r" * (n % 3),
                "category": ("creak", "qasc", "sensemaking", "x")[n % 4] if name == "flan_cot" else f"about {n // 2}",
            }
            for n in range(first, first + 40)
        ]
        rows.append({"id": f"{name}/long", "instruction": "x" * 800, "response": "y", "category": "creak"})
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = argparse.Namespace(train=24, test=12, model="tiny", answers=0, budget=6, pool=20, minutes=9.0)
    flags.targets, flags.shots, flags.seeds, flags.draw = "svamp,piqa", "2,6", [0, 1], 0
    flags.methods = ",".join(sys.modules["evidence_steps"].METHODS)
    patched = pytest.MonkeyPatch()
    patched.setattr(rows_module, "BANK_ROWS", 10)
    yield sys.modules["evidence_steps"].Plan(tmp_path / "data", tmp_path / "out", flags, [0, 1])
    patched.undo()


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mix", ["maths", "general", "domains"])
def test_rows_are_even_over_the_sets_and_none_is_tested_that_was_trained_on(rows_module, plan, mix):
    def write() -> dict[str, bytes]:
        rows_module.write_mix(plan.data, plan.output, rows_module.MIXES[mix], plan.seeds, 24, 12)
        return {str(file): file.read_bytes() for file in plan.output.rglob("*.jsonl")}

    before = write()
    sides = {side: read(plan.output / f"{side}.jsonl") for side in ("inside", "outside", "train-0", "train-1")}
    tested = {rows_module.group(row) for side in ("inside", "outside") for row in sides[side]}
    for side, rows in sides.items():
        sets = getattr(rows_module.MIXES[mix], side.partition("-")[0])
        counts = {name: sum(row["source"] == name for row in rows) for name in sets}
        assert set(counts.values()) == {(24 if side.startswith("train") else 12) // len(sets)}
        assert len({row["instruction"] for row in rows}) == len(rows)
        assert side in ("inside", "outside") or not tested & {rows_module.group(row) for row in rows}
    assert sides["train-0"] != sides["train-1"]
    assert before == write()


@pytest.mark.parametrize("mix", ["maths", "domains"])
def test_another_draw_of_tests_has_no_row_that_was_tested_or_that_any_seed_knows(rows_module, plan, mix):
    rows_module.write_mix(plan.data, plan.output, rows_module.MIXES[mix], [0, 1], 16, 8)
    first = {file.name: file.read_bytes() for file in plan.output.glob("*.jsonl")}
    rows_module.write_mix(plan.data, plan.output, rows_module.MIXES[mix], [0, 1], 16, 8, 1)
    files = {file.name: file for file in plan.output.glob("*.jsonl")}
    other = {"inside-draw1.jsonl", "outside-draw1.jsonl"} | ({"crossing-draw1.jsonl"} if mix == "domains" else set())
    assert {name: files[name].read_bytes() for name in first} == first and set(files) - set(first) == other

    def groups(names: set[str]) -> set[str]:
        asked = {name for name in names if not name.startswith("crossing")}  # made of those that are tested inside
        return {rows_module.group(row) for name in asked for row in read(files[name])}

    assert groups(other) and not groups(other) & groups(set(first))


@pytest.mark.parametrize("draw", [0, 1])
def test_a_mix_is_compared_by_the_methods_and_on_the_rows_that_are_asked_for(evidence, plan, draw):
    plan.flags.methods, plan.flags.draw = "base,random-cluster,lorauter,prefill", draw
    made = list(sys.modules["evidence_steps"].PARTS["general"](plan))
    trained = [step.words[-1] for step in made if step.words[0] == "train-extras"]
    assert trained == ["random-cluster", "lorauter"] * 2
    evaluations = {step.output.name: step.words for step in made if step.words[0] == "eval"}
    ending = "-draw1" if draw else ""
    assert list(evaluations) == [f"{side}{ending}-{seed}" for seed in (0, 1) for side in ("inside", "outside")]
    for name, words in evaluations.items():
        assert words[words.index("--methods") + 1] == plan.flags.methods
        assert Path(words[words.index("--data") + 1]).stem == name[:-2]
    assert [name for _, name, *_ in evidence.compared(plan, "general")] == [f"inside{ending}", f"outside{ending}"]


def test_no_article_is_on_both_sides_and_requests_that_cross_domains_join_two_tested_questions(rows_module, plan):
    rows_module.write_mix(plan.data, plan.output, rows_module.MIXES["domains"], [0], 24, 12)
    inside, train = read(plan.output / "inside.jsonl"), read(plan.output / "train-0.jsonl")
    articles = [{row["category"] for row in rows if row["source"] == "reading"} for rows in (inside, train)]
    assert articles[0] and articles[1] and not articles[0] & articles[1]
    crossing = read(plan.output / "crossing.jsonl")
    assert len({row["source"] for row in crossing}) == len(crossing) == 12  # ordered pairs of four domains
    tested = [row["instruction"] for row in inside]
    assert all(sum(own in row["instruction"] for own in tested) >= 2 for row in crossing)
    assert read(plan.output / "train-0" / "code.jsonl") == [row for row in train if row["source"] == "code"]


def test_shots_are_known_to_their_targets_own_adapter_alone_and_neither_tests_nor_pool_are(rows_module, plan):
    rows_module.write_kshot(plan.data, plan.output, [2, 5], [0, 1], 12, 20)
    known = {file.stem: read(file) for file in (plan.output / "bank-rows").iterdir()}
    assert set(known) == set(rows_module.SETS)
    taught = {row["instruction"] for rows in known.values() for row in rows}
    others = {row["instruction"] for row in read(plan.output / "pool.jsonl")}
    for target in rows_module.TARGETS:
        shots = read(plan.output / target / "shots-5-0.jsonl")
        assert shots[:2] == read(plan.output / target / "shots-2-0.jsonl")
        assert shots != read(plan.output / target / "shots-5-1.jsonl")
        assert all(row in known[target] for row in shots)
        tests = {row["instruction"] for row in read(plan.output / target / "test.jsonl")}
        assert len(tests) == 12 and not tests & taught and not tests & others
    assert len(others) == 20 and not others & taught


def test_influence_chooses_among_rows_that_are_neither_trained_on_nor_aimed_at_nor_tested(rows_module, plan):
    mix = rows_module.MIXES[rows_module.UNLIKE]
    rows_module.write_mix(plan.data, plan.output / "mix", mix, [0], 24, 12)
    rows_module.write_influence(plan.data, plan.output, plan.output / "mix", [0], 8, 12, 6)
    parts = {name: read(plan.output / f"{name}-0.jsonl") for name in ("aimed", "many", "random")}
    asked = {name: {row["instruction"] for row in rows} for name, rows in parts.items()}
    asked["test"] = {row["instruction"] for row in read(plan.output / "test.jsonl")}
    asked["train"] = {row["instruction"] for row in read(plan.output / "mix" / "train-0.jsonl")}
    assert len(asked["random"]) == 6 and asked["random"] <= asked["many"]
    assert not asked["many"] & (asked["aimed"] | asked["test"] | asked["train"])
    assert not asked["aimed"] & (asked["test"] | asked["train"])


def test_refusal_is_told_rows_of_the_kinds_that_come_from_outside_and_none_that_is_tested(rows_module, plan):
    mix = rows_module.MIXES[rows_module.UNLIKE]
    rows_module.write_mix(plan.data, plan.output / "mix", mix, [0, 1], 24, 12)
    rows_module.write_unlike(plan.data, plan.output, plan.output / "mix", [0, 1])
    tested = {row["instruction"] for row in read(plan.output / "mix" / "outside.jsonl")}
    told = [read(plan.output / f"unlike-{seed}.jsonl") for seed in (0, 1)]
    assert all({row["source"] for row in rows} == {*mix.outside} for rows in told)
    assert tested and not tested & {row["instruction"] for rows in told for row in rows} and told[0] != told[1]


@pytest.mark.parametrize("part", ["maths", "general", "unlike", "domains", "kshot", "recruit", "influence"])
def test_every_step_is_a_command_that_writes_what_tells_that_it_is_done(plan, run, monkeypatch, part):
    given = []
    for name, command in COMMANDS.items():
        stand_in = lambda settings, **_: given.append(settings)  # noqa: E731
        monkeypatch.setitem(COMMANDS, name, replace(command, function=stand_in))
    steps = sys.modules["evidence_steps"].PARTS[part]
    made = list(steps(plan))
    assert len({step.output for step in made}) == len(made)
    for step in made:
        code, _, err = run(*step.words)
        assert code == 0, err
        settings = given.pop()
        target = Path(getattr(settings, "output", None) or getattr(settings, "mixture", None) or settings.folder)
        assert step.output == target or target in step.output.parents
    rows = [word for step in made for word in step.words if word.endswith(".jsonl") and "-0/" not in word]
    written = [Path(word.rpartition("=")[2]) for word in rows]
    assert all(file.exists() for file in written if file.name not in ("chosen.jsonl", "gathered.jsonl"))


def test_the_methods_that_are_compared_exist(evidence):
    steps = sys.modules["evidence_steps"]
    for family, names in (
        (ELREA, steps.METHODS),
        (ELREA, steps.REFUSING),
        (TOKENS, steps.TOKENS),
        (KSHOT, (*steps.KSHOT, *steps.ON_SHOTS_ALONE)),
    ):
        for name in names:
            family.method(name)
    trained = {need for names in steps.EXTRAS.values() for need in ELREA.needs(names.split(","))}
    assert set(steps.EXTRAS) <= trained
    assert {name for pair in evidence.PAIRS for name in pair} <= set(steps.METHODS)


@pytest.mark.parametrize("part", ["maths", "general", "unlike", "domains", "kshot", "influence"])
def test_what_a_table_compares_is_among_the_methods_that_its_evaluation_has(evidence, plan, part):
    made = sys.modules["evidence_steps"].PARTS[part](plan)
    words = {step.output: step.words for step in made if step.words[0] == "eval"}
    for _, name, control, *others in evidence.compared(plan, part):
        for seed in plan.seeds:
            told = words[plan.output / part / f"{name}-{seed}"]
            methods = told[told.index("--methods") + 1].split(",")
            if "--every" in told:
                methods += [f"token-level:every={every}" for every in told[told.index("--every") + 1].split(",")]
            assert {control, *(name for pair in (others or [()])[0] for name in pair)} <= set(methods)


def asked(evidence, monkeypatch, plan, commands) -> None:
    """Type the command, with other steps: Python code in place of commands of `coterie`."""
    steps = sys.modules["evidence_steps"]
    made = [steps.Step((code,), plan.output / name) for name, code in commands.items()]
    popen = evidence.subprocess.Popen
    monkeypatch.setattr(evidence.subprocess, "Popen", lambda words: popen((words[0], "-c", words[-1])))
    monkeypatch.setitem(steps.PARTS, "maths", lambda plan: iter(made))
    monkeypatch.setattr(evidence, "table", lambda title, folders, *_: f"{title} {[own.name for own in folders]}\n")
    panel = evidence.Panel("rows", {})
    monkeypatch.setattr(evidence.Panel, "of", lambda title, folders: panel._replace(title=f"{title} {len(folders)}"))
    monkeypatch.setattr(
        evidence, "picture", lambda mixes: str({mix: [own.title for own in ps] for mix, ps in mixes.items()})
    )
    (plan.output / "maths").mkdir(parents=True, exist_ok=True)
    words = [str(plan.data), str(plan.output), "--minutes", str(plan.flags.minutes), "--seeds", "3,4"]
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words])
    evidence.main()


def touch(plan, name: str) -> str:
    return f"open({str(plan.output / name)!r}, 'x').close()"


def test_what_was_done_is_not_done_again_and_the_table_comes_last(evidence, monkeypatch, plan, capsys):
    commands = {name: touch(plan, name) for name in ("a", "maths/inside-3", "maths/inside-4", "maths/outside-4")}
    asked(evidence, monkeypatch, plan, commands)
    told = "maths, inside ['inside-3', 'inside-4']\n\nmaths, outside ['outside-4']\n"
    assert capsys.readouterr().out == told + "\n"
    asked(evidence, monkeypatch, plan, commands)  # a second `a` would fail: the file exists
    assert (plan.output / "maths" / "tables.md").read_text() == told
    assert (plan.output / "mixes.svg").read_text() == "{'maths': ['inside 2', 'outside 1']}"
    (plan.output / "kshot").mkdir()
    (plan.output / "kshot" / "tables.md").write_text("kshot\n")
    asked(evidence, monkeypatch, plan, commands)
    assert (plan.output / "tables.md").read_text() == told + "\nkshot\n"  # of all parts that are done


def test_the_first_seed_of_every_part_comes_before_the_second_of_any(evidence, plan):
    steps = evidence.left(plan, ["maths", "general"])
    seeds = [int(step.output.name[-1]) if step.output.name[-1].isdigit() else None for step in steps]
    assert [seed for seed in seeds if seed is not None] == sorted(seed for seed in seeds if seed is not None)
    parts = [step.output.relative_to(plan.output).parts[0] for step in steps]
    assert parts == [part for _ in plan.seeds for part in ("maths", "general") for _ in range(len(steps) // 4)]


def test_a_step_that_runs_out_of_time_is_interrupted_and_what_is_left_is_told(evidence, monkeypatch, plan):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
    code += f"try: time.sleep(60)\nexcept KeyboardInterrupt: {touch(plan, 'interrupted')}"
    plan.flags.minutes = 0.02  # a second or so: the child has to come up
    monkeypatch.setattr(evidence, "ROOM", 0)
    (plan.output / "maths" / "outside-3").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2 steps are left: type the same command again"):
        asked(evidence, monkeypatch, plan, {"a": code, "b": touch(plan, "b")})
    assert not (plan.output / "b").exists()
    assert (plan.output / "maths" / "tables.md").read_text() == "maths, outside ['outside-3']\n"


def test_a_step_that_fails_ends_it(evidence, monkeypatch, plan):
    with pytest.raises(SystemExit, match="this failed with 2: .*"):
        asked(evidence, monkeypatch, plan, {"a": "raise SystemExit(2)"})


def written(tmp_path, nll: dict[str, list[list[float]]], tokens: list[float]) -> list[Path]:
    """Write evaluations with these likelihoods, by method, seed and row."""
    evaluation, rows = records()
    folders = [tmp_path / f"inside-{seed}" for seed in range(len(next(iter(nll.values()))))]
    for seed, folder in enumerate(folders):
        results = [
            {method: {"nll": seeds[seed][number], "tokens": int(count)} for method, seeds in nll.items()}
            for number, count in enumerate(tokens)
        ]
        own = [{**rows[0], "methods": methods} for methods in results]
        table = [line for line in evaluation["table"] if line["method"] in nll]
        folder.mkdir()
        summary = {**evaluation, "methods": list(nll), "rows": len(own), "table": table, "control": "base"}
        (folder / "evaluation.json").write_text(json.dumps(summary))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folders


def test_the_table_pairs_rows_over_seeds_and_tells_how_much_of_the_oracles_gain_is_luck(evidence, tmp_path):
    nll = {
        "base": [[2.0, 3.0, 4.0, 5.0], [2.2, 3.2, 4.2, 5.2]],
        "elrea": [[1.8, 2.9, 3.5, 4.9], [1.8, 2.9, 3.9, 4.9]],
        "random-oracle": [[1.9, 2.8, 3.6, 4.7], [1.9, 2.8, 3.6, 4.7]],
        "oracle": [[1.7, 2.6, 3.2, 4.4], [1.7, 2.6, 3.2, 4.4]],
    }
    tokens = [1.0, 2.0, 3.0, 4.0]
    text = evidence.table("maths, inside", written(tmp_path, nll, tokens), "base", [("elrea", "random-oracle")])
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    mean = {name: np.mean(seeds, axis=0) for name, seeds in nll.items()}
    gain = {name: np.average(mean["base"] - own, weights=tokens) for name, own in mean.items()}
    tests = {
        name: sign_flip_test(mean[name].tolist(), mean["base"].tolist(), weights=tokens)
        for name in nll
        if name != "base"
    }
    assert text.startswith("## maths, inside, 2 seeds\n\n| ")
    assert lines["elrea"][1] == f"{np.average(mean['elrea'], weights=tokens):.4f}" and lines["elrea"][2] == "4"
    assert lines["elrea"][3].startswith(f"{-gain['elrea']:+.4f} [")
    assert lines["elrea"][4] == f"{holm(tests)['elrea']:.4f}"
    seeds = [np.average(np.subtract(*pair), weights=tokens) for pair in zip(nll["elrea"], nll["base"], strict=True)]
    assert lines["elrea"][5] == " ".join(f"{seed:+.4f}" for seed in seeds)
    assert lines["elrea"][6] == "100%"
    assert lines["random-oracle"][7].startswith(f"{gain['random-oracle'] / gain['oracle']:.0%} [")
    between = np.average(mean["elrea"] - mean["random-oracle"], weights=tokens)
    assert lines["elrea - random-oracle"][1].startswith(f"{between:+.4f} [")


def test_a_table_of_tasks_adjusts_p_for_the_tasks_of_a_line(evidence, tmp_path):
    control, one, better = (
        [2.0, 3.0, 4.0, 5.0, 3.0, 4.0],
        [1.9, 3.1, 4.2, 5.0, 3.0, 4.0],
        [1.5, 2.4, 3.1, 4.0, 2.2, 3.4],
    )
    tokens, folders = [1.0, 2.0, 3.0, 4.0, 1.0, 2.0], {}
    for task, own in (("svamp", better), ("piqa", control)):
        (tmp_path / task).mkdir()
        nll = {"base": [control], "alone": [one], "trained": [own]}
        folders[task] = written(tmp_path / task, nll, tokens)
    lines = evidence.table_of_tasks("all targets", folders, "base", ["alone"]).splitlines()
    assert lines[0] == "## all targets" and lines[2] == "|  | svamp | p | piqa | p |"
    cells = {line.split(" | ")[0].strip("| "): [own.strip(" |") for own in line.split(" | ")] for line in lines[4:]}
    assert list(cells) == ["base", "alone - base", "trained - base", "alone", "trained - alone"]
    assert cells["base"][1] == f"{np.average(control, weights=tokens):.4f}"
    gap = np.average(np.subtract(better, one), weights=tokens)
    assert cells["trained - alone"][1].startswith(f"{gap:+.4f} [")
    p = {
        "svamp": sign_flip_test(better, one, weights=tokens),
        "piqa": sign_flip_test(control, one, weights=tokens),
    }
    assert [cells["trained - alone"][place] for place in (2, 4)] == [f"{holm(p)[task]:.4f}" for task in p]
    assert holm(p)["svamp"] == 2 * p["svamp"] < 0.1
    assert cells["trained - base"][3] == "0, on every row"


def test_a_method_that_is_its_control_on_every_row_has_no_interval_without_end(evidence, tmp_path):
    nll = {name: [[2.0, 3.0, 4.0, 5.0]] for name in ("base", "refusing")}
    nll["elrea"] = [[2.0, 3.0, 4.5, 5.000001]]
    text = evidence.table("outside", written(tmp_path, nll, [1.0, 2.0, 3.0, 4.0]), "base")
    assert "| refusing | 4.0000 | 4 | 0, on every row | 1.0000 | +0.0000 | 0% |" in text
    assert "| 25% |" in next(line for line in text.splitlines() if line.startswith("| elrea"))


def test_the_picture_has_every_method_at_its_value_and_fills_what_is_significant(evidence, tmp_path):
    base, tokens = [2.0, 3.0, 4.0, 5.0, 3.0, 4.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 1.0]
    gaps = {
        "<auto>": [-0.4, -0.3],
        "elrea": [0.2, 0.4],
        "prefill": [0.1, -0.1],
        "refusing": [0.0, 0.0],
        "backbone": [9.0, 9.5],
    }
    nll = {"base": [base], **{name: [[b + own[n % 2] for n, b in enumerate(base)]] for name, own in gaps.items()}}
    panel = evidence.Panel.of("inside", written(tmp_path, nll, tokens))
    drawing = ElementTree.fromstring(evidence.picture({"a mix": [panel, panel]}))
    groups = drawing.findall(".//{*}g")
    dots = {group.find("{*}title").text.partition(",")[0]: group.find("{*}circle").attrib for group in groups[:4]}
    assert len(groups) == 8 and list(dots) == ["<auto>", "elrea", "prefill", "refusing"]
    assert [dot["class"] for dot in dots.values()] == ["better", "worse", "open", "open"]
    places, values = [float(dot["cx"]) for dot in dots.values()], [panel.methods[name].gap for name in dots]
    assert values.pop() is None and panel.title == "inside (8 rows)"
    per_nat = (places[1] - places[3]) / values[1].value
    assert places[0] - places[3] == pytest.approx(per_nat * values[0].value, abs=0.2) and per_nat > 0


def test_rows_whose_answer_is_not_graded_are_left_out_of_accuracy_alone(evidence, tmp_path):
    folders = written(tmp_path, {"base": [[2.0, 3.0]], "elrea": [[1.0, 3.5]]}, [1, 1])
    rows = read(folders[0] / "rows.jsonl")
    rows[0]["methods"]["base"]["correct"], rows[0]["methods"]["elrea"]["correct"] = False, True
    (folders[0] / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    likelihood, accuracy = sys.modules["evidence_tables"].read(folders)
    assert (likelihood.name, len(likelihood.weights), likelihood.mean("elrea")) == ("NLL", 2, 2.25)
    assert (accuracy.name, len(accuracy.weights), accuracy.mean("elrea")) == ("accuracy", 1, 1.0)
