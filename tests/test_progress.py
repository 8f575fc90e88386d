"""One bar for the whole of a command: its length is known before the first step, and it ends at its end."""

import io
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm as plain_tqdm

import tiny
from conftest import FIT, write_rows
from coterie import progress
from coterie.methods.elrea import fit
from coterie.progress import part, steps, whole
from symbolic_place import rows as asked


class Seen(plain_tqdm):
    """A bar that keeps all that it showed."""

    made: list["Seen"] = []

    def __init__(self, *given, **how):
        super().__init__(*given, **how, file=io.StringIO(), mininterval=0, miniters=0)
        self.seen = [(self.n, self.initial)] if not self.disable else []
        self.made.append(self)

    def update(self, n=1):
        super().update(n)
        if not self.disable:
            self.seen.append((self.n, self.initial))

    @property
    def text(self):
        return self.fp.getvalue()


@pytest.fixture
def bars(monkeypatch):
    """All bars that are shown, on a terminal."""
    Seen.made = []
    make = progress._bar

    def seen(*given, **how):  # bars of other libraries are none of ours
        with monkeypatch.context() as patch:
            patch.setattr("tqdm.auto.tqdm", Seen)
            return make(*given, **how)

    monkeypatch.setattr(progress, "_bar", seen)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    return Seen.made


def work(told, count, note=""):
    for _ in range(count):
        told(1, note)


def test_the_bar_of_a_command_is_as_long_as_its_parts_and_loops_move_it_by_their_share(bars):
    with whole("fit", {"train": 30.0, "score": 10.0}):
        with part("train"), steps("training", 3, "step") as told:
            work(told, 3)
        with part("score"), steps("likelihood", 2, "row") as told:
            work(told, 2)
    (bar,) = bars
    assert bar.total == 40
    assert [n for n, _ in bar.seen] == pytest.approx([0, 10, 20, 30, 35, 40])
    assert bar.n == 40 and bar.initial == 0


def test_a_part_in_parts_of_its_own_is_divided_in_their_ratio(bars):
    with whole("fit", {"experts": 8.0}), part("experts"), whole("experts", {"a": 1, "b": 3}):
        for name in "ab":
            with part(name), steps(name, 1, "step") as told:
                told()
    assert [n for n, _ in bars[0].seen] == pytest.approx([0, 2, 8]) and len(bars) == 1


def test_what_was_done_before_counts_and_tells_nothing_of_the_pace(bars):
    with whole("fit", {"trained before": 50.0, "half": 20.0, "new": 30.0}):
        with part("trained before"):
            pass
        with part("half"), steps("training", 10, "step", done=5) as told:
            work(told, 5)
        with part("new"), steps("training", 3, "step") as told:
            work(told, 3)
    assert bars[0].n == 100 and bars[0].initial == pytest.approx(60)


def test_the_time_left_is_that_of_the_pace_so_far(bars, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(Seen, "_time", lambda self: now[0], raising=False)
    with whole("fit", {"before": 50.0, "now": 10.0, "later": 40.0}):
        bar = bars[0]
        bar._time, bar.start_t = (lambda: now[0]), 0.0
        with part("before"):
            pass
        with part("now"), steps("training", 10, "step") as told:
            now[0] = 20.0
            work(told, 10)
        bar.refresh()
        assert "60%" in bar.text and "00:20 gone, 01:20 left" in bar.text.rpartition("\r")[2]


def test_loops_that_tell_too_much_or_too_little_end_where_their_part_ends(bars):
    with whole("fit", {"a": 1.0, "b": 1.0}):
        with part("a"), steps("x", 2, "step") as told:
            work(told, 5)
        with part("b"), steps("x", 5, "step") as told:
            work(told, 2)
    assert max(n for n, _ in bars[0].seen) < 2 and bars[0].n == 2


def test_a_loop_inside_a_loop_and_a_part_that_is_done_again_are_no_further_work(bars):
    with whole("fit", {"a": 4.0, "b": 4.0}):
        with part("a"), steps("outer", 2, "step") as told:
            with steps("inner", 100, "row") as inner:
                work(inner, 100)
            assert bars[0].n == 0
            work(told, 2)
        with part("a"):
            pass
        assert bars[0].n == 4
    assert bars[0].n == 8 and len(bars) == 1


def test_a_loop_alone_has_a_bar_of_its_own_and_one_without_a_name_has_none(bars):
    with steps("answers", 4, "prompt", done=1) as told:
        work(told, 3, "loss 1.5")
    with steps("", 4, "prompt") as told:
        work(told, 4)
    assert (bars[0].n, bars[0].initial, bars[0].total) == (4, 1, 4) and "loss 1.5" in bars[0].text
    assert bars[1].disable


def test_a_command_without_parts_shows_nothing_of_what_is_done_in_it(bars):
    with whole("plan", {}), whole("answers", {"answers": 3}), part("answers"), steps("answers", 3, "answer") as told:
        work(told, 3)
    assert [bar.disable for bar in bars] == [True]


def test_an_error_leaves_the_bar_where_it_was(bars):
    with pytest.raises(ValueError), whole("fit", {"a": 2.0}), part("a"), steps("x", 2, "step") as told:
        told()
        raise ValueError
    assert bars[0].n == 1 and bars[0].disable  # closed


def test_a_part_that_was_not_planned_is_no_part(bars):
    with pytest.raises(KeyError), whole("fit", {"a": 1.0}), part("b"):
        pass


def test_a_log_gets_a_plain_line_now_and_then_and_none_of_what_is_over_soon(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with whole("fit", {"before": 20.0, "train": 80.0}):
        with part("before"):
            pass
        with part("train"), steps("training base", 16, "step") as told:
            for _ in range(16):
                now[0] += 4.0
                told(1, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "fit: 35%, 00:12 gone, 00:52 left, training base, loss 0.5",
        "fit: 75%, 00:44 gone, 00:20 left, training base, loss 0.5",
        "fit: 100%, 01:04 gone, 00:00 left, training base, loss 0.5",
    ]
    with steps("answers", 9, "prompt", done=4) as told:
        now[0] += 11.0
        told()
    assert capsys.readouterr().err.splitlines() == ["answers: 5 of 9, 00:11 gone, 00:44 left"] * 2
    with whole("fit", {"train": 3.0}), part("train"), steps("training base", 3, "step") as told:
        now[0] += 9.9
        work(told, 3)
    assert capsys.readouterr().err == ""


def test_a_command_in_a_log_can_still_say_how_libraries_write_bars():
    """They read how they write when tqdm is first imported, so in a process of its own."""
    code = "import sys, coterie.cli.commands; sys.exit('tqdm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------- the commands themselves

TRAINING = ["--epochs", 2, "--batch-size", 4, "--learning-rate", "1e-2"]
CPU = ["--device", "cpu"]
HIDDEN = ["--encoder", "hidden"]


@pytest.fixture
def whole_bar(run, bars):
    """Run a command; give the one bar that it showed: of a length known before the first step, to its end."""

    def typed(*words):
        bars.clear()
        code, _, err = run(*words)
        assert code == 0, err
        (bar,) = [bar for bar in bars if bar.seen]
        places = [n for n, _ in bar.seen]
        assert places[0] == 0 and places == sorted(places), "it never goes back"
        assert bar.n == bar.total, "it ends at its end"
        return bar

    return typed


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tiny_rows = [{**row, "category": f"kind {number % 2}"} for number, row in enumerate(tiny.make_rows(12, seed=1))]
    return write_rows(folder / "rows.jsonl", tiny_rows)


def test_fit_elrea_is_weighed_by_rows_and_epochs(whole_bar, model_folder, rows, tmp_path):
    words = ["--model", model_folder, "--data", rows, "--clusters", 2, "--cluster-rounds", 1, "--d-proj", 16]
    bar = whole_bar("fit", "elrea", *words, "--expert-epochs", 3, *TRAINING, *CPU, "--output", tmp_path / "run")
    assert bar.total == 12 * (2 * progress.TRAINING + 2 * progress.GRADIENTS + 3 * progress.TRAINING)
    assert bar.initial == pytest.approx(0, abs=1e-9), "every part told of its steps"


def test_a_fit_that_goes_on_counts_what_was_there(whole_bar, run, bars, model_folder, rows, tmp_path, monkeypatch):
    words = ["--model", model_folder, "--data", rows, "--clusters", 2, "--cluster-rounds", 1, "--d-proj", 16]
    words = ["fit", "elrea", *words, "--expert-epochs", 1, *TRAINING, *CPU, "--output", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "cluster", interrupted)
        assert run(*words)[0] == 130
    bar = whole_bar(*words)
    assert bar.initial == pytest.approx(12 * (2 * progress.TRAINING + 2 * progress.GRADIENTS))


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_fit_token_level(whole_bar, model_folder, rows, tmp_path):
    words = ["--model", model_folder, "--data", f"a={rows}", "--data", f"b={rows}", *TRAINING, *CPU, *HIDDEN]
    bar = whole_bar("fit", "token-level", *words, "--output", tmp_path / "run")
    assert bar.total == pytest.approx(2 * 12 * (2 * progress.TRAINING + progress.EMBEDDING))
    assert bar.initial == pytest.approx(0, abs=1e-9)


def test_train_extras_and_eval(whole_bar, run_folder, rows, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    methods = ["--methods", "random-cluster,moe-routing,elrea,base"]
    bar = whole_bar("eval", copy, "--data", rows, *methods, "--max-new-tokens", 3, *CPU, "--output", tmp_path / "eval")
    scores, answers = 12 * (progress.GRADIENTS + 4), 4 * 12 * progress.ANSWERING
    assert bar.total == pytest.approx(36 * progress.TRAINING + scores + answers), "with what had to be trained"
    bar = whole_bar("train-extras", copy, "--methods", "mole,lora-ensembles", "--ensemble-size", 2, *CPU)
    assert bar.total == pytest.approx(36 * (progress.TRAINING + FIT["epochs"] * progress.TRAINING))
    bar = whole_bar("eval", copy, "--data", rows, "--methods", "elrea", "--max-new-tokens", 3, *CPU,
                    "--output", tmp_path / "again")  # fmt: skip
    assert bar.total == 12 * (progress.GRADIENTS + 1 + progress.ANSWERING)


def test_what_a_task_takes(whole_bar, run, model_folder, run_folder, rows, tmp_path):
    bank, adapters = tmp_path / "bank", sorted((run_folder / "experts").iterdir())
    assert run("bank", "add", bank, *adapters, "--model", model_folder, *CPU)[0] == 0
    shots = ["--shots", rows, "--limit", 4, "--keep", 2]
    chosen = len(adapters) * 4 * (1 + progress.ANSWERING)
    bar = whole_bar("select", bank, *shots, "--max-new-tokens", 3, *CPU, "--output", tmp_path / "select")
    assert bar.total == chosen and bar.initial == pytest.approx(0, abs=1e-9)
    pool = write_rows(tmp_path / "pool.jsonl", tiny.make_rows(9, seed=8))
    kept = ["--pool", pool, "--embeddings", tmp_path / "kept", *HIDDEN, *CPU]
    bar = whole_bar("fit", "kshot-moe", "--bank", bank, *shots, "--max-new-tokens", 3, *TRAINING, *kept,
                    "--budget", 3, "--output", tmp_path / "task")  # fmt: skip
    assert bar.total == pytest.approx(chosen + 9 * progress.EMBEDDING + 2 * (4 + 3) * 2 * progress.TRAINING)


def test_gather_tells_of_the_texts_that_were_never_embedded(whole_bar, model_folder, rows, tmp_path):
    pool = write_rows(tmp_path / "pool.jsonl", tiny.make_rows(9, seed=8))
    words = ["--shots", rows, "--pool", pool, "--model", model_folder, *HIDDEN, *CPU, "--block-rows", 4]
    words += ["--exclude-tau", 1]
    bar = whole_bar("gather", *words, "--embeddings", tmp_path / "kept", "--output", tmp_path / "gathered")
    assert bar.total == 9


def test_recruited_experts(whole_bar, place, run, tmp_path):
    data = write_rows(tmp_path / "val.jsonl", asked(6))
    bar = whole_bar("profile", place.pool, "--data", data, "--encoder", "none", "--retries", 0)
    assert bar.total == progress.ANSWERING * 6 * (5 + 3)
    fitted = ["fit", "symbolic-moe", "--experts", place.pool, "--output", tmp_path / "run", "--retries", 0]
    assert run(*fitted)[0] == 0
    whole_bar("eval", tmp_path / "run", "--data", data, "--retries", 0, "--output", tmp_path / "eval")
    questions = write_rows(tmp_path / "new.jsonl", asked(3, first=20))
    whole_bar("generate", tmp_path / "run", "--input", questions, "--retries", 0)


def test_generate_shows_how_many_prompts_are_answered_and_nothing_for_one(whole_bar, run, bars, run_folder, rows):
    bar = whole_bar("generate", run_folder, "--input", rows, "--max-new-tokens", 2, *CPU)
    assert bar.total == 12
    bars.clear()
    assert run("generate", run_folder, "Hello", "--max-new-tokens", 2, *CPU)[0] == 0
    assert not [bar for bar in bars if bar.seen]
