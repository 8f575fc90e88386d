"""A bank of adapters of the tiny model, and open data: what the tests of k-shot expertise work on."""

import shutil
from pathlib import Path

import pytest

import tiny
from coterie import methods
from coterie.methods.add_adapters import bank_add
from tiny import write_rows

SOURCES = ("sum", "spell", "pick")
FAST = {"max_new_tokens": 6, "device": "cpu"}
FIT = {**FAST, "keep": 2, "epochs": 1, "learning_rate": 5e-3, "batch_size": 4}


def rows_of(source: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    return [row for row in tiny.make_rows(3 * count, seed) if row["source"] == source]


@pytest.fixture(scope="session")
def shelf(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for each kind of rows, one of each rank, and the files that they were trained on."""
    folder = tmp_path_factory.mktemp("shelf")
    for number, source in enumerate(SOURCES):
        for rank in (2, 3):
            name = f"{source}-{rank}"
            data = write_rows(folder / f"{name}.jsonl", rows_of(source, 8, seed=10 * rank + number))
            methods.token_level(
                str(model_folder), {name: str(data)}, output=folder / "runs" / name, rank=rank, epochs=3,
                learning_rate=1e-2, batch_size=4, encoder="hidden", device="cpu",
            )  # fmt: skip
            shutil.copytree(folder / "runs" / name / "experts" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def bank(shelf: Path, model_folder: Path) -> Path:
    names = [f"{source}-{rank}" for source in SOURCES for rank in (2, 3)]
    added = bank_add(
        shelf / "bank",
        [shelf / name for name in names],
        model=str(model_folder),
        trained_on=[f"{name}={shelf / name}.jsonl" for name in names],
        device="cpu",
    )
    assert all(one.card for one in added)
    return shelf / "bank"


@pytest.fixture(scope="session")
def pool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = tiny.make_rows(24, seed=5)
    return write_rows(tmp_path_factory.mktemp("pool") / "pool.jsonl", [{**row, "id": f"p{row['id']}"} for row in rows])
