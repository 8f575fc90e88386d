"""`coterie gather` from files to files: what it embeds, what it counts, what it writes, and what it refuses."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import coterie
import tiny
from conftest import write_rows
from coterie.data.examples import load_examples
from coterie.data.row_selection import CHOSEN, LEFT
from coterie.data.streaming import stream_examples, text_of
from coterie.errors import CoterieError
from coterie.features import embedding
from coterie.features import embedding_store as stored
from coterie.features.embedding_store import EmbeddingStore, TextEncoder, load_text_encoder
from coterie.methods.kshot import gather_rows as gathering
from coterie.methods.kshot.gather_rows import drawn_rows, lay_out
from coterie.settings.groups import PlacementSettings
from helpers import refused, unit
from test_embedding import make_bert, make_tokenizer


class WordEncoder:
    """Counts the words of a text, each with a direction of its own; remembers every text it was given."""

    name, dimensions, window = "words", 48, 1000

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.stop_after = math.inf

    def __call__(self, texts):
        if len(self.seen) + len(texts) > self.stop_after:
            raise KeyboardInterrupt
        self.seen += texts
        return normalize(torch.stack([sum(map(self.direction, text.split())) for text in texts]), dim=1)

    def direction(self, word: str) -> torch.Tensor:
        return unit(1, self.dimensions, seed=int.from_bytes(word.encode()[:7]))[0]

    def rows(self, rows):
        raise NotImplementedError


@pytest.fixture
def encoder(monkeypatch) -> WordEncoder:
    words = WordEncoder()
    monkeypatch.setattr(gathering, "load_text_encoder", lambda *_: TextEncoder(words, "0" * 64))
    return words


@pytest.fixture
def store(tmp_path) -> EmbeddingStore:
    return EmbeddingStore(TextEncoder(WordEncoder(), "0" * 64), tmp_path / "store")


def test_no_embeddings_are_kept_through_a_planted_link(store, tmp_path):
    (tmp_path / "project").mkdir()
    store.folder.parent.mkdir()
    store.folder.symlink_to(tmp_path / "project")
    with pytest.raises(CoterieError, match="is a link or a file where a folder is needed"):
        store.add(["a text"])
    assert not list((tmp_path / "project").iterdir())


def test_stored_rows_are_the_embeddings_in_any_order_and_any_slice(store):
    texts = [f"word{number} of {number % 7}" for number in range(50)]
    for start in range(0, 50, 13):
        store.add(texts[start : start + 13])
    wanted = WordEncoder()(texts)
    mixed = np.random.default_rng(0).permutation(50)
    rows = store.rows(stored.text_keys([texts[number] for number in mixed]))
    assert len(rows) == 50
    assert torch.equal(rows[:], wanted[mixed]) and torch.equal(rows[7:20], wanted[mixed[7:20]])
    some = np.array([40, 3, 3, 12])
    assert torch.equal(rows[some], wanted[mixed[some]]) and rows[some[:0]].shape == (0, 48)


def test_only_texts_that_are_not_there_are_missing(store):
    assert store.missing(stored.text_keys(["a", "b"])).tolist() == [True, True]
    store.add(["b", "c"])
    assert store.missing(stored.text_keys(["a", "b", "c", "d"])).tolist() == [True, False, False, True]
    store.embed(["a", "b", "a"])
    assert store._encode.seen == ["b", "c", "a"]
    with pytest.raises(CoterieError, match="lost embeddings"):
        store.rows(stored.text_keys(["never"]))


def test_an_embedding_that_is_no_number_is_told_and_not_kept(store, monkeypatch):
    monkeypatch.setattr(WordEncoder, "direction", lambda self, word: torch.full((48,), math.nan))
    with pytest.raises(CoterieError, match="makes no numbers of the text 'a b'"):
        store.add(["a b"])
    assert not store.folder.exists()


def test_a_shard_that_is_broken_or_of_another_encoder_is_told(store):
    store.add(["a", "b"])
    (shard,) = store.folder.iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(CoterieError, match=rf"{shard.name} is broken .*; delete the file"):
        store.missing(stored.text_keys(["a"]))
    stored.write_tensors(shard, {"keys": torch.zeros(2, 16, dtype=torch.uint8), "embeddings": torch.zeros(2, 5)})
    with pytest.raises(CoterieError, match="holds no embeddings of this encoder"):
        store.missing(stored.text_keys(["a"]))


@pytest.fixture
def bert(tmp_path) -> Path:
    folder = tmp_path / "bert"
    make_bert().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_minilm_and_folders_need_no_base_model(bert, monkeypatch):
    monkeypatch.setattr(embedding, "fetch_alias", lambda name: {"minilm": bert}[name])
    monkeypatch.setattr(stored, "load_backbone", lambda *_: pytest.fail("a base model was loaded"))
    placement = PlacementSettings(device="cpu")
    by_name, by_folder = (load_text_encoder(name, None, placement) for name in ("minilm", str(bert)))
    texts = ["a b", "c"]
    assert torch.equal(by_name.encode(texts), by_folder.encode(texts))
    assert by_name.identity == by_folder.identity
    assert by_name.encode(texts).norm(dim=1).numpy() == pytest.approx([1, 1], abs=1e-6)
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert load_text_encoder(str(bert), None, placement).identity != by_name.identity


def test_hidden_is_the_base_model_and_belongs_to_its_weights(model_folder, backbone, tmp_path):
    placement = PlacementSettings(device="cpu")
    found = load_text_encoder("hidden", str(model_folder), placement)
    texts = ["add 3 4", "SPELL IT"]
    assert torch.equal(found.encode(texts), coterie.features.embedding.HiddenStateEncoder(backbone)(texts))
    other = load_text_encoder("hidden", str(tiny.save_model(tmp_path / "other", seed=1)), placement)
    assert other.identity != found.identity
    for name, model in (("hidden", None), ("minilm", "m")):
        with pytest.raises(CoterieError, match="--encoder hidden and --model belong together"):
            load_text_encoder(name, model, placement)
    with pytest.raises(CoterieError, match="Did you mean 'minilm'"):
        load_text_encoder("minilmm", None, placement)


def row(question: str, answer: str = "yes", **fields: str) -> dict[str, str]:
    return {"instruction": question, "response": answer, **fields}


SHOTS = [row("red apple tree"), row("green pear tree", id="pear")]
TEST = [{"instruction": "blue plum tree"}, row("ripe fig tree", "so sweet")]
POOL = [
    row("red apple bush", source="fruit"),
    row("RED  apple tree", "another answer"),  # the question of a shot
    row("Blue plum\ntree", "no"),  # of a test row
    row("tree apple red"),  # the words of a shot: cosine 1
    row("fig ripe tree", "sweet so"),  # of a test row
    row("green hedge bush", source="garden"),  # a text that stands twice
    row("bush apple red"),  # the words of the first row
    row("green hedge bush"),
    row("stone wall moss"),
]
OPTIONS = {"budget": 2, "tau": 0.95, "exclude_tau": 0.95}


@pytest.fixture
def files(tmp_path) -> SimpleNamespace:
    parts = {"shots": SHOTS, "test": TEST, "pool": POOL}
    return SimpleNamespace(**{name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()})


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gathered.jsonl").read_text().splitlines()]


def test_a_worked_example_counts_every_row_once(encoder, files, tmp_path):
    found = coterie.gather(files.shots, files.pool, exclude=files.test, output=tmp_path / "out", **OPTIONS)
    assert found.summary["rows"] == len(POOL)
    assert found.summary["fates"] == {
        "copy of another row": 1,
        "question of an example": 1,
        "question of an excluded row": 1,
        "too near to an example": 1,
        "too near to an excluded row": 1,
        "too near to a chosen row": 1,
        "beyond the budget": 1,
        "chosen": 2,
    }
    rows = {row["messages"][0]["content"]: row for row in read(found.folder)}
    assert len(rows) == 2 and "green hedge bush" in rows and set(rows) & {"red apple bush", "bush apple red"}
    hedge = rows["green hedge bush"]
    assert (hedge["nearest_shot"], hedge["pool"]) == ("pear", files.pool) and hedge["pool_id"] in ("5", "7")
    words = WordEncoder()(["green hedge bush\nyes", "green pear tree\nyes"])
    assert hedge["similarity"] == pytest.approx(float(words[0] @ words[1]), abs=1e-6)
    assert found.summary["shots"] == [{"id": "0", "nearest_of_chosen": 1}, {"id": "pear", "nearest_of_chosen": 1}]
    assert found.summary["pools"] == [{"pool": files.pool, "rows": 9, "chosen": 2}]
    assert found.summary["similarity_quantiles"]["chosen"][-1] == max(row["similarity"] for row in rows.values())
    assert [text_of(row) for row in found.examples] == [
        "\n".join(message["content"] for message in row["messages"]) for row in read(found.folder)
    ]


def test_the_map_has_every_example_and_compared_row_once_with_its_fate_and_the_start_of_its_text(
    encoder, files, tmp_path
):
    found = coterie.gather(files.shots, files.pool, exclude=files.test, output=tmp_path / "out", **OPTIONS)
    points = found.summary["map"]
    fates = [point["fate"] for point in points]
    assert fates[:4] == ["shot", "shot", "chosen", "chosen"]
    assert sorted(fates[4:]) == sorted(set(gathering.BY_EMBEDDING.values()) - {"chosen"})
    assert [point["label"] for point in points[:2]] == ["red apple tree yes", "green pear tree yes"]
    assert [point["similarity"] for point in points[:2]] == [None, None]
    chosen = {" ".join(text_of(row).split()): row for row in found.examples}
    similarity = {row["id"]: row["similarity"] for row in read(found.folder)}
    for point in points[2:4]:
        assert point["similarity"] == similarity[chosen[point["label"]].id]


def test_the_map_lies_along_the_two_directions_in_which_texts_vary_most(encoder, files, tmp_path):
    found = coterie.gather(files.shots, files.pool, exclude=files.test, output=tmp_path / "out", **OPTIONS)
    points = found.summary["map"]
    texts = [" ".join(point["label"].split()[:-1]) for point in points]
    features = WordEncoder()(
        [f"{text}\n{point['label'].split()[-1]}" for text, point in zip(texts, points, strict=True)]
    )
    centred = (features - features.mean(dim=0)).double()
    values, directions = torch.linalg.eigh(centred.T @ centred)
    assert values[-1] > 1.1 * values[-2] > 1.2 * values[-3]
    for axis, way in (("x", -1), ("y", -2)):
        along = (centred @ directions[:, way]).numpy()
        drawn = np.array([point[axis] for point in points])
        assert np.abs(drawn).max() > 0.3
        assert min(np.abs(drawn - along).max(), np.abs(drawn + along).max()) < 1e-4


def test_a_long_text_has_a_short_label_and_texts_that_are_all_alike_share_a_place(encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(WordEncoder, "direction", lambda self, word: torch.eye(48)[0])  # equal to the last bit
    alike = [" ".join(["word"] * count) for count in (90, 80)]
    shots, pool = (load_examples([row(text, "word")]) for text in alike)
    found = coterie.gather(shots, pool, output=tmp_path / "out", **{**OPTIONS, "exclude_tau": 1.0})
    assert {(point["x"], point["y"]) for point in found.summary["map"]} == {(0.0, 0.0)}
    assert [point["label"] for point in found.summary["map"]] == ["word " * 12] * 2


def test_of_a_large_pool_the_map_draws_the_rows_with_the_smallest_keys_and_reads_no_others():
    keys = np.random.default_rng(3).permutation(5000)
    fates = np.where(np.arange(5000) % 3 == 0, CHOSEN, LEFT)
    drawn = drawn_rows(fates, keys)
    chosen, others = drawn[:400], drawn[400:]
    assert len(others) == 600 and (fates[chosen] == CHOSEN).all() and (fates[others] == LEFT).all()
    for rows, fate in ((chosen, CHOSEN), (others, LEFT)):
        assert keys[rows].tolist() == sorted(keys[fates == fate])[: len(rows)]

    class Pool:
        def __len__(self):
            return 5000

        def __getitem__(self, rows):
            assert rows.tolist() == drawn.tolist()
            return unit(len(rows), 8, seed=1)

    shots, rows = lay_out(unit(3, 8, seed=2), Pool(), drawn)
    assert (len(shots), len(rows)) == (3, 1000)


def comparable(folder: Path) -> list[dict]:
    """The chosen rows without where they stood."""
    return [{key: value for key, value in row.items() if key not in ("pool", "pool_id")} for row in read(folder)]


@given(order=st.permutations(range(len(POOL))), cut=st.integers(1, len(POOL) - 1), block=st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_neither_the_order_of_rows_nor_of_files_changes_what_is_gathered(order, cut, block, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("order")
    mixed = [POOL[number] for number in order]
    parts = [write_rows(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((mixed[:cut], mixed[cut:]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "load_text_encoder", lambda *_: TextEncoder(WordEncoder(), "0" * 64))
        shots, test = load_examples(SHOTS), load_examples(TEST, need_response=False)
        common = {"exclude": test, "embeddings": str(tmp_path / "kept"), **OPTIONS}
        plain = coterie.gather(shots, load_examples(POOL), output=tmp_path / "plain", **common)
        found = coterie.gather(shots, list(map(str, parts)), output=tmp_path / "mixed", block_rows=block, **common)
    assert comparable(found.folder) == comparable(plain.folder)
    assert found.summary["fates"] == plain.summary["fates"]
    assert found.summary["map"] == plain.summary["map"]


def test_a_second_run_embeds_only_what_is_new(encoder, files, tmp_path):
    common = {"embeddings": str(tmp_path / "kept"), **OPTIONS}
    first = coterie.gather(files.shots, files.pool, output=tmp_path / "one", **common)
    seen = len(encoder.seen)
    assert seen == len(set(encoder.seen)) == 2 + len(POOL) - 2  # neither the copy nor the question of a shot
    again = coterie.gather(files.shots, files.pool, output=tmp_path / "two", **common)
    assert len(encoder.seen) == seen and read(again.folder) == read(first.folder)
    more = write_rows(tmp_path / "more.jsonl", [row("red apple fence"), POOL[0]])
    coterie.gather(files.shots, [files.pool, str(more)], output=tmp_path / "three", **common)
    assert encoder.seen[seen:] == ["red apple fence\nyes"]


def test_an_interrupted_run_goes_on_with_what_it_has_embedded(encoder, files, tmp_path):
    whole = coterie.gather(
        files.shots, files.pool, output=tmp_path / "whole", embeddings=str(tmp_path / "a"), **OPTIONS
    )
    encoder.seen.clear()
    encoder.stop_after = 5
    common = {"embeddings": str(tmp_path / "b"), "block_rows": 2, "output": tmp_path / "out", **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        coterie.gather(files.shots, files.pool, **common)
    assert len(encoder.seen) == 4 and not (tmp_path / "out").exists()
    encoder.stop_after = math.inf
    found = coterie.gather(files.shots, files.pool, **common)
    assert len(encoder.seen) == len(set(encoder.seen)) == 9
    assert read(found.folder) == read(whole.folder) and found.summary == whole.summary


def test_pools_are_read_in_one_go_up_to_the_limit(files):
    assert [row.id for row in stream_examples(files.pool, 3)] == ["0", "1", "2"]
    assert list(stream_examples(files.pool)) == load_examples(files.pool)


def test_a_pool_that_changes_while_it_is_read_is_told(encoder, files, tmp_path, monkeypatch):
    add = EmbeddingStore.add

    def meddle(self, texts):
        add(self, texts)
        with Path(files.pool).open("a") as file:
            file.write(json.dumps(row("late")) + "\n")

    monkeypatch.setattr(EmbeddingStore, "add", meddle)
    with pytest.raises(CoterieError, match="the pool changed while it was read"):
        coterie.gather(files.shots, files.pool, output=tmp_path / "out", embeddings=str(tmp_path / "kept"), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"pool": []}, r"empty.jsonl holds no examples"),
        ({"shots": [{"response": "yes"}]}, r"shots.jsonl, line 1 has the fields response"),
        ({"shots": [row(" ")]}, r"shots.jsonl, line 1 has an empty prompt"),
        ({"pool": [row("a"), {"instruction": "b"}]}, r"pool.jsonl, line 2 has no response"),
        ({"pool": SHOTS}, r"none of the 2 pool rows is left"),
        ({"tau": 1.5}, r"--tau: .*less than or equal to 1, got 1.5"),
        ({"tau": 0}, r"--tau: .*greater than 0"),
        ({"tau": "nan"}, r"--tau"),
        ({"budget": 0}, r"--budget: .*greater than or equal to 1"),
        ({"block-rows": 0}, r"--block-rows"),
        ({"gamma": 0}, r"--gamma"),
        ({"rule": "cosine"}, r"rule"),
        ({"encoder": "/nowhere"}, r"no encoder, local folder or hub id is called '/nowhere'"),
        ({"encoder": "hidden"}, r"--encoder hidden and --model belong together"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, files, bert, tmp_path, change, pattern):  # noqa: F811
    words = {"shots": files.shots, "pool": files.pool, "output": tmp_path / "out", "encoder": bert, "device": "cpu"}
    for name in change.keys() & {"shots", "pool"}:
        file = "empty" if not change[name] else name
        words[name] = write_rows(tmp_path / f"{file}.jsonl", change[name])
    words |= {name: value for name, value in change.items() if name not in ("shots", "pool")}
    refused(run("gather", *(f"--{name}={value}" for name, value in words.items())), pattern)
    assert not list(tmp_path.glob("out*"))


def letters(count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    return [row(" ".join(generator.choices("abcdefgh", k=5)), generator.choice("xyz")) for _ in range(count)]


def test_the_command_line_is_python_and_repeats_from_its_record(run, bert, tmp_path):  # noqa: F811
    files = [str(write_rows(tmp_path / f"{n}.jsonl", letters(count, n))) for n, count in enumerate((3, 40, 4))]
    options = {"encoder": str(bert), "device": "cpu", "budget": 5, "tau": 0.98, "exclude_tau": 0.999, "rule": "kde"}
    python = coterie.gather(files[0], files[1], output=tmp_path / "python", exclude=files[2], **options)
    assert len(read(python.folder)) == 5
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    data = [f"--shots={files[0]}", f"--pool={files[1]}", f"--exclude={files[2]}"]
    out = tmp_path / "cli"
    code, text, _ = run("gather", *data, f"--output={out}", *words, "--json")
    assert code == 0 and json.loads(text) == python.summary
    assert read(out) == read(python.folder)
    refused(run("gather", *data, f"--output={out}", *words), "exists; choose another --output")
    code, text, _ = run("gather", *data, f"--output={out}", *words, "--overwrite")
    assert code == 0 and text.startswith(f"{out}/gathered.jsonl: 40 pool rows: ") and text.endswith("5 chosen\n")
    record = tmp_path / "again.yaml"
    record.write_text((out / "run.yaml").read_text().replace(f"output: {out}", f"output: {tmp_path / 'again'}"))
    assert run("run", record)[0] == 0 and read(tmp_path / "again") == read(out)
