"""What grows with the number of rows, or of adapters, and how fast: seconds, memory and the exponent of each.

Every number is of a process of its own, which finds its input on the disk and does one thing as the library does it:

`read`      reads a file of rows, tokenises them with the base model's tokenizer and hashes them, as a fit begins
`features`  moves shards of gradient features (8,192 dimensions) into their one file, as that stage ends
`birch`     clusters such a file by BIRCH and takes the centroids
`kmeans`    the same by spherical k-means, which compares rows with a few centres in place of thousands of leaves
`gather`    chooses 1,000 of a pool's rows by 50 examples; a stand-in embeds, since that takes the same for every row
`list`      opens a bank and prints its table
`select`    chooses four adapters of the bank by eight examples, halving from one example on
`route`     loads a mixture of all of them and routes a prompt by similarity

`own` is the most memory that the process held by itself; `resident` counts mapped pages of files, too, which the system
takes back when it needs them. Exponents are slopes of the logarithms over the last two sizes. Adapters are of a small
random model (four layers, 512 wide, rank 16, 2.5 MB each).

Pieces run one by one (`growth.py gather 1000000`), each within ten minutes, and are joined in the file that `--output`
names; without any, all run that are not in it. What they find on the disk is made first, once, in `--folder`; the same
line goes on with what was interrupted.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import hardware_record
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coterie.artifacts import write_json, write_jsonl, write_tensors
from coterie.backbone.aliases import fetch_alias
from coterie.backbone.linear_layers import linear_shapes
from coterie.data.batching import PromptFormat, TokenRow, tokenise
from coterie.data.examples import load_examples, spool_all
from coterie.data.spooled import Chosen
from coterie.data.streaming import index_pools
from coterie.experts.bank import write_adapter
from coterie.experts.bank_folder import open_bank
from coterie.experts.clustering import cluster
from coterie.features.embedding_store import TextEncoder, text_keys
from coterie.features.gradient import SHARD_ROWS, read_features, write_features
from coterie.lora import LoraPair
from coterie.methods.add_adapters import bank_add
from coterie.methods.common import hash_examples
from coterie.methods.kshot.choose_adapters import select
from coterie.methods.kshot.gather_rows import OpenData, write_gathered
from coterie.methods.token_level.from_adapters import from_adapters
from coterie.mixture import Mixture
from coterie.routers.centroid import centroids_of
from coterie.settings.commands import GatherSettings
from coterie.settings.groups import ClusterSettings
from coterie.settings.reading import from_flat

WIDTH, TOPICS, RANK, SHOTS = 8192, 50, 16, 50
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
WORDS = "the sum of some numbers is what a shop asks for pens and books that cost little or more".split()


# ----------------------------------------------------------------------------------------------- what is on the disk


def made(path: Path, write: Callable[[Path], object]) -> Path:
    """Make a file or folder once; `write` goes on with what an interrupted one left."""
    if not path.exists():
        partial = path.with_name(f".{path.name}")
        write(partial)
        partial.rename(path)
    return path


def rows_of(size: int) -> Iterator[dict[str, str]]:
    """Make rows of about sixty tokens, all different, of five sources."""
    for number in range(size):
        text = " ".join(WORDS[(number * 7 + place * (1 + number % 5)) % len(WORDS)] for place in range(20))
        asked = f"Question {number}: {text}?"
        yield {"id": str(number), "source": f"s{number % 5}", "instruction": asked, "response": f"It is {number % 97}."}


def rows_file(folder: Path, size: int) -> Path:
    """Write rows to a file."""
    return made(folder / f"rows-{size}.jsonl", lambda path: write_jsonl(path, rows_of(size)))


def topical(start: int, count: int) -> Tensor:
    """Draw features around topics."""
    topics = torch.randn(TOPICS, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(start + 1)
    chosen = torch.randint(TOPICS, (count,), generator=generator)
    return topics[chosen] + torch.randn(count, WIDTH, generator=generator)


def shards_folder(folder: Path, size: int) -> Path:
    """Write the shards that the stage of features has before its end; they are used up."""
    path = folder / f"shards-{size}"
    path.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, size, SHARD_ROWS)):
        file = path / f"{number:05d}.safetensors"
        if not file.exists():
            write_tensors(file, {"features": topical(start, min(SHARD_ROWS, size - start))})
    return path


def shards_again(folder: Path, size: int) -> Path:
    """Write shards; what was made of earlier ones goes first, since there may be no room for both."""
    shutil.rmtree(folder / f"features-{size}", ignore_errors=True)
    return shards_folder(folder, size)


def features_folder(folder: Path, size: int) -> Path:
    """Write the features of so many rows, as that stage does."""
    if not (folder / f"features-{size}").exists():
        features(shards_folder(folder, size), folder)
    return folder / f"features-{size}"


def small_model(folder: Path) -> Path:
    """Save a small random model with the tokenizer of smollm2-135m."""

    def write(path: Path) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(fetch_alias("smollm2-135m"))
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, tie_word_embeddings=True, **SHAPE)
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)

    return made(folder / "model", write)


def bank_folder(folder: Path, size: int) -> Path:
    """Add random adapters to a bank."""

    def write(path: Path) -> None:
        path.mkdir(exist_ok=True)
        model = small_model(folder)
        shapes = linear_shapes(LlamaForCausalLM.from_pretrained(model).model)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
        config |= {"target_modules": sorted({name.rpartition(".")[2] for name in shapes})}
        adapters = [path / f"a{number:04d}" for number in range(size)]
        for adapter in [one for one in adapters if not one.exists()]:
            draw = torch.Generator().manual_seed(int(adapter.name[1:]))
            updates = {
                f"model.{name}": LoraPair(
                    torch.randn(RANK, wide, generator=draw) / 16, torch.randn(RANK, out, generator=draw) / 64
                )
                for name, (wide, out) in shapes.items()
            }
            write_adapter(adapter, {**config, "base_model_name_or_path": str(model)}, updates)
        results = bank_add(path / "bank", adapters, model=str(model), device="cpu")
        assert all(result.card for result in results)
        for adapter in adapters:
            shutil.rmtree(adapter)

    return made(folder / f"bank-{size}", write) / "bank"


def mixture_folder(folder: Path, size: int) -> Path:
    """Make a mixture of a bank that routes by similarity to two texts of each adapter."""
    bank = bank_folder(folder, size)
    texts = {
        name: load_examples([{"instruction": f"{name} {word}", "response": name} for word in WORDS[:2]])
        for name in open_bank(bank).names
    }

    def write(path: Path) -> None:
        from_adapters(bank, texts, output=path, encoder="hidden", device="cpu")

    return made(folder / f"mixture-{size}", write)


# ------------------------------------------------------------------------------------------------------ what is done


def read(path: Path, folder: Path) -> None:
    """Read and tokenise rows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(fetch_alias("smollm2-135m"))
    prompts = PromptFormat(tokenizer)
    examples = spool_all([str(path)])
    tokenise(prompts, examples, 2048)
    hash_examples(examples)


class Moved:
    """Features that were all computed."""

    settings = type("Settings", (), {"d_proj": WIDTH})


def features(path: Path, folder: Path) -> None:
    """Move shards into one file."""
    size = path.name.rpartition("-")[2]
    rows: Any = Chosen([TokenRow((0,), 1, (False,), (True,))], np.zeros(int(size), dtype=int))
    moved: Any = Moved()
    write_features(moved, rows, path)
    path.rename(folder / f"features-{size}")


def clustered(path: Path, method: str) -> None:
    """Cluster features and take centroids."""
    found = read_features(path, None, "make them again")
    groups = cluster(found, ClusterSettings.model_validate({"cluster_method": method}))
    centroids_of(found, groups.labels, groups.count)


class Standin:
    """Embeds a text by four bytes of its key."""

    name, dimensions, window = "stand-in", 384, 512

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Add up a vector for each byte."""
        table = torch.randn(4, 256, self.dimensions, generator=torch.Generator().manual_seed(0))
        keys = np.frombuffer(text_keys(texts).tobytes(), np.uint8).reshape(len(texts), -1)[:, :4]
        sums = sum(table[place][torch.from_numpy(keys[:, place].copy()).long()] for place in range(4))
        return torch.nn.functional.normalize(torch.as_tensor(sums), dim=1)


def gather(path: Path, folder: Path) -> None:
    """Choose rows of a pool; nothing is embedded yet."""
    output = Path(tempfile.mkdtemp(dir=folder))
    flat = {"shots": ["shots"], "pool": [str(path)], "output": str(output), "embeddings": str(output)}
    settings = from_flat(GatherSettings, {**flat, "budget": 1000})
    shots = load_examples([{**row, "instruction": f"Shot. {row['instruction']}"} for row in rows_of(SHOTS)])
    stand_in: Any = Standin()
    index = index_pools({str(path): str(path)}, None, shots, [])
    write_gathered(output, OpenData(shots, [], index), TextEncoder(stand_in, "0" * 64), settings)
    shutil.rmtree(output)


def choose(path: Path, folder: Path) -> None:
    """Choose adapters by examples."""
    shots = folder / "shots.jsonl"
    write_jsonl(shots, rows_of(8))
    output = Path(tempfile.mkdtemp(dir=folder)) / "selection"
    select(path, str(shots), output=output, rank_by="perplexity", halving=1, group_size=8, device="cpu")
    shutil.rmtree(output.parent)


def route(path: Path, folder: Path) -> None:
    """Load a mixture and route a prompt."""
    Mixture.from_pretrained(path, device="cpu").route(f"a0003 {WORDS[0]}")


Prepare = Callable[[Path, int], Path]
MILLION, FEWER, ADAPTERS = (1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000, 100_000), (10, 100, 1_000)
PIECES: dict[str, tuple[Prepare, Callable[[Path, Path], object], tuple[int, ...]]] = {
    "read": (rows_file, read, MILLION),
    "features": (shards_again, features, MILLION),
    "birch": (features_folder, lambda path, folder: clustered(path, "birch"), FEWER),
    "kmeans": (features_folder, lambda path, folder: clustered(path, "spherical-kmeans"), MILLION),
    "gather": (rows_file, gather, MILLION),
    "list": (bank_folder, lambda path, folder: str(open_bank(path)), ADAPTERS),
    "select": (bank_folder, choose, ADAPTERS),
    "route": (mixture_folder, route, ADAPTERS),
}
"""By name: what makes its input, what is measured, and at which sizes."""


# -------------------------------------------------------------------------------------------------------- measuring


def status(name: str) -> float:
    """Return a number of bytes that Linux tells of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Run something and return its seconds and the most memory that the process had meanwhile."""
    own, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            own[0] = max(own[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "own_mib": round(own[0]), "resident_mib": round(status("VmHWM"))}


def one(name: str, size: int, folder: Path) -> dict[str, float]:
    """Prepare and measure a piece, each in a process of its own."""
    for part in ("prepare", "measure"):
        command = [sys.executable, __file__, name, str(size), "--folder", str(folder), "--part", part]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told.splitlines()[-1])


def exponents(sizes: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return by what power of the size each number grows, between the last two sizes."""
    (small, before), (large, after) = sorted(
        ((int(size), own) for size, own in sizes.items()), key=lambda pair: pair[0]
    )[-2:]
    step = math.log(large / small)
    return {key: round(math.log(max(after[key], 1e-3) / max(before[key], 1e-3)) / step, 2) for key in after}


def main() -> None:
    """Run pieces and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", nargs="?", choices=PIECES)
    parser.add_argument("size", nargs="?", type=int)
    parser.add_argument("--quick", action="store_true", help="the smallest size of each")
    parser.add_argument("--folder", type=Path, help="keep here what is on the disk: up to 70 GB")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file, beside what it has")
    parser.add_argument("--part", choices=("prepare", "measure"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    folder = (flags.folder or Path(tempfile.mkdtemp(prefix="coterie-growth-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if flags.part:
        prepare, run, _ = PIECES[flags.piece]
        path = prepare(folder, flags.size)
        print(json.dumps(measured(lambda: run(path, folder)) if flags.part == "measure" else {}))
        return
    result = json.loads(flags.output.read_text()) if flags.output and flags.output.exists() else {"pieces": {}}
    pieces: dict[str, dict[str, Any]] = result["pieces"]
    for name, (_, _, sizes) in PIECES.items():
        wanted = [flags.size] if flags.size else sizes[:1] if flags.quick else sizes
        for size in wanted if flags.piece in (None, name) else ():
            own = pieces.setdefault(name, {"sizes": {}})
            if flags.size or str(size) not in own["sizes"]:
                own["sizes"][str(size)] = one(name, size, folder)
            if len(own["sizes"]) > 1:
                own["exponents"] = exponents(own["sizes"])
            settings = {"dimensions": WIDTH, "adapter_rank": RANK, "base": SHAPE}
            result = {"name": "growth", "hardware": hardware_record(), "settings": settings, "pieces": pieces}
            if flags.output:
                write_json(flags.output, result)
    print(json.dumps(result, indent=1))
    if not flags.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
