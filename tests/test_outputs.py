"""Nothing that is there is written over, unless it is asked for and the same command has made it."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coterie.artifacts import (
    RunFolder,
    append_text,
    check_file,
    check_output,
    real_folder,
    whole_file,
    write_answers,
    write_text,
)
from coterie.artifacts.folders import replace_folder
from coterie.errors import CoterieError
from coterie.settings.reading import Settings
from test_artifacts import OVERWRITE, FitX, FitY, everything, fails, is_stopped, run_once


@pytest.fixture
def precious(tmp_path) -> Path:
    """Somebody's project, and what must be in it in the end."""
    folder = tmp_path / "precious"
    write_text(folder / "thesis.tex", "years of work")
    yield folder
    assert everything(folder) == ["thesis.tex"] and (folder / "thesis.tex").read_text() == "years of work"


def spoil(path: Path, settings: Settings, why: str) -> None:
    """Every way to write a run to a path is refused, and changes nothing."""
    before = everything(path.parent)
    for use in (lambda: check_output(path, settings), lambda: run_once(path, settings=settings)):
        with pytest.raises(CoterieError, match=why):
            use()
    assert everything(path.parent) == before


# ------------------------------------------------------------------------------------------------ which may be replaced


def test_an_output_that_does_not_exist_is_free(tmp_path):
    check_output(tmp_path / "run", FitX())
    check_output(tmp_path / "run", OVERWRITE)


def other_yaml(path: Path) -> None:
    write_text(path / "run.yaml", "command: make\nsettings: {}\n")


OCCUPIED = {
    "a run": (run_once, None),
    "an empty folder": (Path.mkdir, None),
    "a folder of other things": (lambda path: write_text(path / "thesis.tex", "x"), "is not a run folder"),
    "a file": (lambda path: path.write_text("x"), "is no folder"),
    "another tool's run.yaml": (other_yaml, "is not a run folder"),
    "a run of another command": (lambda path: run_once(path, settings=FitY()), "was made by coterie fit y, not by"),
}


@pytest.mark.parametrize(("make", "_"), OCCUPIED.values(), ids=OCCUPIED)
def test_an_output_that_exists_is_refused(make, _, tmp_path):
    make(tmp_path / "run")
    spoil(tmp_path / "run", FitX(), "run exists; choose another --output, or add --overwrite to replace it")


@pytest.mark.parametrize(("make", "why"), OCCUPIED.values(), ids=OCCUPIED)
def test_only_runs_of_the_same_command_and_empty_folders_are_replaced(make, why, tmp_path):
    make(tmp_path / "run")
    if why is None:
        run_once(tmp_path / "run", lambda run: write_text(run.path / "new", "x"), settings=OVERWRITE)
        assert everything(tmp_path) == ["run", "run/new", "run/run.yaml"]
    else:
        spoil(tmp_path / "run", OVERWRITE, f"run {why}.*, so it is not replaced; choose another")


def test_a_record_that_lists_no_files_lets_nothing_be_replaced(tmp_path, precious):
    """A copy of an old record may lie in any folder: it does not make a run of what is there."""
    run_once(tmp_path / "run")
    record, listed, _ = (tmp_path / "run" / "run.yaml").read_text().partition("files:\n")
    assert listed
    (precious / "run.yaml").write_text(record)
    spoil(precious, OVERWRITE, "has a run.yaml that does not list which files the run wrote, so it is not replaced")
    (precious / "run.yaml").unlink()


def test_a_link_that_has_the_name_of_a_folder_set_aside_is_left_alone(tmp_path):
    run_once(tmp_path / "elsewhere")
    run_once(tmp_path / "run")
    aside = tmp_path / ".run.0123456789abcdef.old"
    aside.symlink_to("elsewhere")
    run_once(tmp_path / "run", settings=OVERWRITE)
    assert aside.is_symlink() and everything(tmp_path / "elsewhere") == ["run.yaml"]


LOCKS = {
    "a link": lambda lock, precious: lock.symlink_to(precious),
    "another name of a file": lambda lock, precious: lock.hardlink_to(precious),
    "a file of somebody's": lambda lock, precious: lock.write_text("package versions"),
    "a pipe": lambda lock, precious: os.mkfifo(lock),
    "a folder": lambda lock, precious: lock.mkdir(),
}


@pytest.mark.parametrize("make", LOCKS.values(), ids=LOCKS)
def test_what_has_the_name_of_a_lock_and_is_none_is_left_alone(make, tmp_path, precious):
    lock = tmp_path / ".run.lock"
    make(lock, precious / "thesis.tex")
    before = os.lstat(lock)
    with pytest.raises(CoterieError, match=r"run\.lock is no lock file of coterie's, and would be .* over; move it"):
        run_once(tmp_path / "run")
    assert os.lstat(lock).st_size == before.st_size and os.lstat(lock).st_ino == before.st_ino


@pytest.mark.parametrize("left", ["", '{"pid": 1, "host": "x", "since": "yesterday"}'])
def test_the_lock_of_a_process_that_was_killed_is_taken_over(left, tmp_path):
    (tmp_path / ".run.lock").write_text(left)
    run_once(tmp_path / "run")
    assert everything(tmp_path) == ["run", "run/run.yaml"]


ADDED = {
    "a file": (lambda path: write_text(path / "notes.md", "x"), "holds notes.md, which the run did not write"),
    "a repository": (lambda path: (path / ".git").mkdir(), "holds a repository, .*/run/.git"),
    "a repository far below": (lambda path: (path / "part" / ".git").mkdir(parents=True), "holds a repository"),
    "a link": (lambda path: (path / "part").symlink_to("/etc"), "holds a link, .*/run/part"),
    "a pipe": (lambda path: os.mkfifo(path / "part"), "holds a pipe or a device, .*/run/part"),
}


@pytest.mark.parametrize(("add", "why"), ADDED.values(), ids=ADDED)
def test_a_run_to_which_something_was_added_is_not_replaced(add, why, tmp_path):
    run_once(tmp_path / "run")
    add(tmp_path / "run")
    spoil(tmp_path / "run", OVERWRITE, why)


def test_what_other_commands_add_to_a_run_does_not_keep_it(tmp_path):
    run_once(tmp_path / "run")
    for name in ("report.html", "methods/seeds/x", "working/methods/x"):
        write_text(tmp_path / "run" / name, "x")
    run_once(tmp_path / "run", settings=OVERWRITE)
    assert everything(tmp_path / "run") == ["run.yaml"]


@pytest.mark.parametrize("where", ["run", "run/part", "run/part/rows.jsonl"])
@pytest.mark.parametrize("named", ["{}", "maths={}"])
def test_a_run_that_is_or_holds_an_input_of_the_call_is_not_replaced(where, named, tmp_path):
    run_once(tmp_path / "run", lambda run: write_text(run.path / "part" / "rows.jsonl", "x"))
    reads = FitX(overwrite=True, data=[named.format(tmp_path / where)])
    spoil(tmp_path / "run", reads, "run is or holds .*, which this call reads, so it is not replaced")


def test_an_input_is_known_through_links(tmp_path):
    run_once(tmp_path / "run", lambda run: write_text(run.path / "rows.jsonl", "x"))
    (tmp_path / "data").symlink_to(tmp_path / "run" / "rows.jsonl")
    spoil(tmp_path / "run", FitX(overwrite=True, data=[str(tmp_path / "data")]), "which this call reads")


@pytest.mark.parametrize("below", [".", "part"])
def test_the_folder_one_is_in_and_its_parents_are_not_replaced(below, tmp_path, monkeypatch):
    run_once(tmp_path / "run", lambda run: write_text(run.path / "part" / "x", "x"))
    monkeypatch.chdir(tmp_path / "run" / below)
    spoil(tmp_path / "run", OVERWRITE, "run is or holds the folder you are in")
    for name in ("..", "../..", "x/.."):
        with pytest.raises(CoterieError, match="has no name of its own; choose another --output"):
            check_output(Path(name), OVERWRITE)
    with pytest.raises(CoterieError, match="has no name of its own"):
        check_output(Path("."), OVERWRITE)


@pytest.mark.parametrize("below", [".", "part"])
def test_a_home_is_not_replaced(below, tmp_path, monkeypatch):
    run_once(tmp_path / "run", lambda run: write_text(run.path / "part" / "x", "x"))
    monkeypatch.setenv("HOME", str(tmp_path / "run" / below))
    spoil(tmp_path / "run", OVERWRITE, "run is or holds your home folder")


def test_a_mount_point_is_not_replaced(tmp_path, monkeypatch):
    run_once(tmp_path / "run")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "run")
    spoil(tmp_path / "run", OVERWRITE, "run is a mount point")


@pytest.mark.parametrize("leads_to", ["precious", "nowhere"])
@pytest.mark.parametrize("name", ["run", "run.partial"])
def test_a_link_as_output_fails_before_any_work(leads_to, name, tmp_path, precious):
    (tmp_path / name).symlink_to(tmp_path / leads_to)
    for settings in (FitX(), OVERWRITE):
        spoil(tmp_path / "run", settings, f"{name} is a link, and nothing is written through links; choose another")


@pytest.mark.parametrize("name", ["x" * 256, "x" * 240, "a\0b", "a\ud800"], ids=["long", "nearly", "NUL", "surrogate"])
def test_names_that_no_folder_can_have_are_told_before_any_work(name, tmp_path):
    with pytest.raises(CoterieError, match="is too long a name for this disk|is no text"):
        check_output(tmp_path / name, FitX())


# --------------------------------------------------------------------------------------------------- how it is replaced


@pytest.mark.parametrize("stop", [fails, is_stopped, lambda _: [][1]], ids=["error", "interrupt", "bug"])
def test_a_run_that_does_not_finish_leaves_the_old_one_as_it_was(stop, tmp_path):
    run_once(tmp_path / "run", lambda run: write_text(run.path / "old", "1"))

    def body(run) -> None:
        write_text(run.path / "new", "2")
        stop(run)

    with pytest.raises((CoterieError, KeyboardInterrupt, IndexError)):
        run_once(tmp_path / "run", body, settings=OVERWRITE)
    assert everything(tmp_path / "run") == ["old", "run.yaml"]
    run_once(tmp_path / "run", settings=OVERWRITE)
    assert everything(tmp_path) == ["run", "run/new", "run/run.yaml"]


def test_an_old_folder_has_its_name_again_when_the_new_one_cannot_have_it(tmp_path):
    write_text(tmp_path / "run" / "old", "1")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nothing", tmp_path / "run", tmp_path / "aside")
    assert everything(tmp_path) == ["run", "run/old"]


class KilledError(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("moment", ["before the new one has its name", "before the old one is deleted"])
def test_a_process_killed_while_it_replaces_a_run_loses_neither(moment, tmp_path, monkeypatch):
    run_once(tmp_path / "run", lambda run: write_text(run.path / "old", "1"))

    def killed(new: Path, folder: Path, aside: Path) -> None:
        folder.rename(aside)
        if moment == "before the old one is deleted":
            new.rename(folder)
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("coterie.artifacts.runs.replace_folder", killed)
        run_once(tmp_path / "run", lambda run: write_text(run.path / "new", "2"), settings=OVERWRITE)
    if moment == "before the new one has its name":
        with pytest.raises(CoterieError, match="run exists"):  # it was put back
            run_once(tmp_path / "run")
        assert "run/old" in everything(tmp_path)
    run_once(tmp_path / "run", lambda run: write_text(run.path / "new", "2"), settings=OVERWRITE)
    assert everything(tmp_path) == ["run", "run/new", "run/run.yaml"]


def test_what_only_looks_like_a_folder_set_aside_is_left_alone(tmp_path, precious):
    shutil.copytree(precious, tmp_path / f".run.{'0' * 16}.old")
    run_once(tmp_path / "run")
    assert (tmp_path / f".run.{'0' * 16}.old" / "thesis.tex").exists()


# ------------------------------------------------------------------------------------- folders that came from elsewhere


@pytest.mark.parametrize("planted", ["working", "working/methods", "working/methods/seeds", "methods"])
def test_no_stage_works_through_a_planted_link(planted, tmp_path, precious):
    run = tmp_path / "run"
    (run / planted).parent.mkdir(parents=True)
    (run / planted).symlink_to(precious)
    calls = []
    with pytest.raises(CoterieError, match=f"run/{planted} is a link or a file where a folder is needed; delete it"):
        RunFolder(run).stage("methods/seeds", calls.append, {})
    assert planted == "methods" or not calls


def test_no_stage_works_beside_a_planted_link(tmp_path, precious):
    (tmp_path / "run/working/part/trainer").mkdir(parents=True)
    (tmp_path / "run/working/part/trainer/checkpoint-1").symlink_to(precious)
    (tmp_path / "run/stages.jsonl").write_text('{"stage": "part", "from": {}}\n')
    with pytest.raises(CoterieError, match="part holds a link, .*/checkpoint-1, which no run makes"):
        RunFolder(tmp_path / "run").stage("part", fails, {})


def test_no_run_works_in_a_partial_folder_with_a_planted_link(tmp_path, precious):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "training").symlink_to(precious)
    with pytest.raises(CoterieError, match="run.partial holds a link, .*/training, which no run makes"):
        run_once(tmp_path / "run")


def test_a_real_folder_is_real_from_its_base_on(tmp_path, precious):
    assert real_folder(tmp_path / "base", "a/b").is_dir()
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "file").write_text("x")
    for base, name in (("link", "a"), ("base", "../link/a"), ("file", "a"), ("base/a", "b/../../../file")):
        with pytest.raises(CoterieError, match="is a link or a file where a folder is needed"):
            real_folder(tmp_path / base, name)


def test_a_planted_temporary_name_is_not_written_through(tmp_path, precious):
    (tmp_path / ".report.html.tmp").symlink_to(precious / "thesis.tex")
    write_text(tmp_path / "report.html", "page")
    assert (tmp_path / "report.html").read_text() == "page" and (tmp_path / ".report.html.tmp").is_symlink()


def test_a_planted_link_with_the_name_of_a_file_is_replaced_and_not_followed(tmp_path, precious):
    (tmp_path / "report.html").symlink_to(precious / "thesis.tex")
    write_text(tmp_path / "report.html", "page")
    assert not (tmp_path / "report.html").is_symlink()


def test_a_temporary_file_is_new_and_has_a_name_that_nobody_guesses(tmp_path, precious, monkeypatch):
    names = []
    for _ in range(2):
        with whole_file(tmp_path / "x") as temporary:
            names.append(temporary.name)
    assert names[0] != names[1]
    monkeypatch.setattr("secrets.token_hex", lambda _: "f" * 16)
    (tmp_path / f".{'f' * 16}.tmp").symlink_to(precious / "thesis.tex")
    with pytest.raises(CoterieError, match="x cannot be written: .*exists"):
        write_text(tmp_path / "x", "page")


def test_files_have_the_mode_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_what_a_killed_process_left_of_a_file_does_not_stay_in_a_run(tmp_path):
    def killed(run: RunFolder) -> None:
        write_text(run.path / "part" / f".{'a' * 16}.tmp", "half")
        raise KilledError

    with pytest.raises(KilledError):
        run_once(tmp_path / "run", killed)
    run_once(tmp_path / "run")
    assert everything(tmp_path / "run") == ["part", "run.yaml"]


def test_somebodys_folder_with_the_name_of_an_unfinished_run_is_not_worked_in(tmp_path):
    write_text(tmp_path / "run.partial" / "working" / "thesis.tex", "x")
    with pytest.raises(CoterieError, match="run.partial is no unfinished run, and run would be made there; move it"):
        run_once(tmp_path / "run")
    assert everything(tmp_path) == ["run.partial", "run.partial/working", "run.partial/working/thesis.tex"]


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_written_over_only_when_asked(tmp_path):
    path = tmp_path / "answers.jsonl"
    check_file(path, FitX())
    path.write_text("x")
    with pytest.raises(CoterieError, match="answers.jsonl exists; choose another --output, or add --overwrite"):
        check_file(path, FitX())
    check_file(path, OVERWRITE)


def test_no_file_of_an_input_is_written_over(tmp_path):
    write_text(tmp_path / "mixture" / "mixture.json", "x")
    (tmp_path / "link").symlink_to(tmp_path / "mixture")
    for given in ("mixture", "mixture/mixture.json", "link"):
        with pytest.raises(CoterieError, match="is or belongs to .*, which this call reads; choose another"):
            check_file(tmp_path / "mixture" / "mixture.json", FitX(overwrite=True, data=[str(tmp_path / given)]))
    check_file(tmp_path / "mixture" / "new.jsonl", FitX(data=[str(tmp_path / "mixture")]))


def test_what_is_read_besides_the_settings_is_not_written_over(tmp_path):
    write_text(tmp_path / "questions.jsonl", "x")
    with pytest.raises(CoterieError, match="is or belongs to .*questions.jsonl, which this call reads"):
        check_file(tmp_path / "questions.jsonl", OVERWRITE, [str(tmp_path / "questions.jsonl")])


def test_nothing_is_added_to_what_a_link_leads_to_or_to_a_pipe(tmp_path, precious):
    append_text(tmp_path / "x", "a\n")
    append_text(tmp_path / "x", "b\n")
    assert (tmp_path / "x").read_text() == "a\nb\n"
    (tmp_path / "link").symlink_to(precious / "thesis.tex")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(CoterieError, match=f"{name} cannot be written"):
            append_text(tmp_path / name, "x")


def test_a_link_or_a_folder_is_no_file_to_write(tmp_path, precious):
    (tmp_path / "x").symlink_to(precious / "thesis.tex")
    for path, why in ((tmp_path / "x", "is a link"), (precious, "is a folder; give the name of a file")):
        with pytest.raises(CoterieError, match=why):
            check_file(path, OVERWRITE)


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    check_file(pipe, FitX())
    write_answers(pipe, [{"text": "é"}, {"text": "b"}])
    reader.join(10)
    assert got == ['{"text": "é"}\n{"text": "b"}\n'] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_to_as_it_is_also_when_it_is_full():
    before = os.stat("/dev/null")
    check_file(Path("/dev/null"), FitX())
    write_answers(Path("/dev/null"), [{"text": "a"}])
    assert os.stat("/dev/null").st_ino == before.st_ino
    with pytest.raises(CoterieError, match="no space left on the disk while writing /dev/full"):
        write_answers(Path("/dev/full"), [{"text": "a"}])


def test_a_disk_that_is_full_at_any_byte_of_a_saved_tensor_is_told(tmp_path):
    script = """
import resource, sys, torch
from pathlib import Path
from coterie.artifacts.files import disk_errors
from coterie.errors import CoterieError

file = Path(sys.argv[1])
torch.save({"step": torch.arange(9)}, file)
size = file.stat().st_size
for room in [0, *range(1, size, 97), size - 1]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        with disk_errors(file):
            torch.save({"step": torch.arange(9)}, file)
    except CoterieError as error:
        assert "while writing" in str(error), error
    else:
        raise AssertionError(f"{room} bytes were enough")
"""
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "optimizer.pt")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
