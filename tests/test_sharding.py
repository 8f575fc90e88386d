"""A base model in parts: FSDP as accelerate's configuration asks for it, and what is refused of such a configuration.

The processes of the slow tests are real ones over gloo; those of the last one are started by accelerate's own launcher.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.tensor import DTensor

import tiny
from conftest import write_rows
from coterie import launcher, ranks
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone, load_backbone
from coterie.data.batching import PromptFormat, TokenRow
from coterie.data.examples import load_examples
from coterie.engine.scoring import score_votes
from coterie.errors import CoterieError
from coterie.experts.checkpoint import load_checkpoint
from coterie.experts.gated_model import GateTraining
from coterie.experts.gates_training import start_gates, train_mixture
from coterie.experts.training import train_adapter
from coterie.experts.training_plan import TrainingPlan
from coterie.features.gradient import GradientFeatures
from coterie.features.prefill import prefill_states
from coterie.methods import elrea
from coterie.methods.elrea import extras as elrea_extras
from coterie.methods.kshot import fit as kshot_fit
from coterie.settings.commands import KshotSettings
from coterie.settings.groups import FeatureSettings, LoraSettings, ModelSettings
from crashing import SERVER
from helpers import close, table
from test_ranks import files_of, three  # noqa: F401 - a fixture

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ZERO3 = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"

# ------------------------------------------------------------------------------------------------- what is refused

REFUSED = table(
    ("ZeRO offload", {**ZERO3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offloaded to 'nvme', which"),
    (
        "ZeRO offload in a file",
        {**DEEPSPEED, FILE: '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}'},
        "offloaded to 'cpu', which was never tried here; set offload_param_device: none",
    ),
    ("no stage", {**DEEPSPEED, FILE: '{"zero_optimization": {"stage": "auto"}}'}, "stage 'auto' of ZeRO; give"),
    ("no file", {**DEEPSPEED, FILE: "/nowhere/zero.json"}, "deepspeed_config_file cannot be read: "),
    ("no object", {**DEEPSPEED, FILE: "[3]"}, "deepspeed_config_file cannot be read: "),
    ("Megatron-LM with ZeRO", {**ZERO3, "ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
    ("Megatron-LM", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
    ("parallelism", {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism_config"),
    ("offload", {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "asks for fsdp_offload_params"),
    ("checkpointing", {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "1"}, "asks for fsdp_activation_checkpointing"),
    ("version 1", {"ACCELERATE_USE_FSDP": "true"}, "version 1 of FSDP; set fsdp_version: 2 .* accelerate to-fsdp2"),
)


@pytest.mark.parametrize(("variables", "told"), REFUSED)
def test_what_was_never_tried_is_refused_by_name(variables, told, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CoterieError, match=told), ranks.joined():
        pass


def test_what_is_heard_with_fsdp_alone_is_not_refused_without_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert launcher.wants_sharding() is False
    with ranks.joined():
        assert "ACCELERATE_USE_FSDP" not in os.environ


STAGES = table(
    ("accelerate's default", {}, False),
    ("data parallel", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, False),
    (
        "states alone",
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
        False,
    ),
    (
        "weights too",
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"},
        True,
    ),
    ("the file says so", {FILE: '{"zero_optimization": {"stage": 3}}'}, True),
    (
        "the file comes first",
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", FILE: '{"zero_optimization": {"stage": 1}}'},
        False,
    ),
    ("the file leaves it out", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", FILE: '{"train_batch_size": 8}'}, False),
)


@pytest.mark.parametrize(("variables", "shards"), STAGES)
def test_only_the_third_stage_of_zero_shards_frozen_weights(variables, shards, monkeypatch):
    for name, value in {**DEEPSPEED, **variables}.items():
        monkeypatch.setenv(name, value)
    assert launcher.wants_sharding() is shards


def test_one_process_that_was_launched_holds_all_of_the_model(monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert launcher.wants_sharding() is True
    with ranks.joined():
        assert not ranks.is_sharded()


def test_a_command_of_one_process_does_not_take_a_part_of_the_model_for_the_whole(run, monkeypatch):
    for name, value in {**FSDP, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, printed, told = run("methods")
    assert (code, printed) == (2, "")
    assert "error: one process does methods by itself, and accelerate's configuration leaves it a part" in told


@pytest.fixture
def with_a_part() -> Iterator[None]:
    """Let this process hold a part of the model, and do what each of them does."""
    token = ranks._NOW.set(ranks._Processes(sharing=ranks._Processes()))
    yield
    ranks._NOW.reset(token)


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"load_in_4bit": True}], ids=str)
def test_a_sharded_model_is_held_in_its_own_type(how, model_folder, with_a_part):
    with pytest.raises(CoterieError, match="in its own type; leave --quantize and --load-in-4bit out"):
        load_backbone(ModelSettings(model=str(model_folder), device="cpu", **how))


def test_what_may_embed_rows_by_the_base_model_itself_is_made_by_all_processes():
    assert all(spec.together for spec in elrea_extras.EXTRAS.values() if "encoder" in spec.settings)


def test_experts_for_shots_are_chosen_before_the_model_is_sharded(tmp_path, with_a_part, monkeypatch):
    monkeypatch.setattr(kshot_fit, "open_task", lambda *given: None)
    settings = KshotSettings(bank="shelf", shots=["shots.jsonl"], output=str(tmp_path / "task"))
    with pytest.raises(CoterieError, match="type: coterie select shelf without .* then give its folder to --selected"):
        kshot_fit.fit_kshot(settings)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- together, in threads of a test


@pytest.fixture
def sharing(three) -> Callable[[Callable[[int], Any]], list[Any]]:  # noqa: F811
    """Let three processes that are threads each hold a part of the model."""

    def run(do: Callable[[int], Any]) -> list[Any]:
        def with_a_part(number: int) -> Any:
            own = ranks._NOW.get()
            ranks._NOW.set(ranks.replace(own, sharing=own))
            return do(number)

        return three.run(with_a_part)

    return run


def test_all_get_equally_many_batches_and_do_every_task_together(sharing, caplog):
    batches = [[0, 1], [2], [3], [4]]
    assert sharing(lambda _: list(ranks.share(batches))) == [[[0, 1], [4]], [[2], []], [[3], []]]
    done: list[tuple[str, int]] = []

    def spread(number: int) -> None:
        tasks = {name: lambda name=name: done.append((name, number)) for name in "abcd"}
        ranks.spread(tasks, dict.fromkeys(tasks, 1.0), "experts")

    with caplog.at_level("INFO", "coterie"):
        sharing(spread)
    assert sorted(done) == [(name, number) for name in "abcd" for number in range(3)]
    assert caplog.messages[0] == "experts: all 3 processes do each of the 4 together"


def test_what_one_does_by_itself_cannot_use_the_model_and_what_each_does_can(sharing):
    assert sharing(lambda _: ranks.each(ranks.is_sharded)) == [True] * 3
    assert sharing(lambda _: ranks.each(lambda: ranks.by_first(ranks.is_sharded))) == [True] * 3
    for one in sharing(lambda _: ranks.by_first(ranks.is_sharded)):
        assert isinstance(one, ranks.SharedError)
        assert "one process does this by itself" in str(one)


def test_trouble_of_one_before_the_model_is_shared_is_the_trouble_of_all(sharing):
    def load(number: int) -> None:
        if number == 1:
            raise CoterieError("no such file")
        ranks.ready()

    found = sharing(lambda number: ranks.each(lambda: load(number)))
    assert [str(one) for one in found] == ["process 1 of 3: no such file"] * 3


# ---------------------------------------------------------------------------------------------------- real processes

LORA, FEATURES = LoraSettings(rank=2, dropout=0.1), FeatureSettings(d_proj=32, feature_batch_size=2)
PLAN = TrainingPlan(1, 1e-2, 4, 2, 0, "none", "adapter", keep_epochs=True)


def rows_of(backbone: Backbone) -> list[TokenRow]:
    return [PromptFormat(backbone.tokenizer, None).row(example) for example in load_examples(tiny.make_rows(5, seed=4))]


def passes(backbone: Backbone, folder: Path) -> dict[str, torch.Tensor]:
    """Everything that passes through the model in a fit; of its batches there are three, an odd number."""
    rows = rows_of(backbone)
    if ranks.count() == 1 or not ranks.rank():
        folder.mkdir()
    ranks.wait()
    train_adapter(backbone, rows, PLAN, folder, LORA)
    ranks.wait()
    point = load_checkpoint(folder / "epoch-0", backbone.model)
    layers = ExpertLayers(backbone.model, [point.adapter, {}])
    adapters = [point.adapter, {path: pair._replace(up=-pair.up) for path, pair in point.adapter.items()}]
    gates = start_gates("random", backbone, adapters, ("one", "other"), top_k=None, seed=1)
    how = GateTraining(dropout=0.1, balance=0.1)
    mixture = train_mixture(backbone, adapters, gates, rows, PLAN, folder / "mixture", how)
    many = rows * 4  # three batches of 8, and of 16
    votes = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[:, None, :].expand(-1, len(many), -1)
    return {
        "gradients": GradientFeatures(backbone, [point], FEATURES)([row.prompt() for row in rows]),
        "losses": score_votes(backbone, layers, ("one", "none"), many, votes, "").nll,
        "states": prefill_states(backbone, many * 2, [1, 2]),
        **load_file(folder / "adapter_model.safetensors"),
        **load_file(folder / "epoch-0" / "adam.safetensors"),
        **{f"gate of {path}": gate for path, gate in mixture.gates.layers.items()},
        **{f"load of {path}": load for path, load in mixture.load.items()},
    }


def member(number: int, count: int, model: str, folder: Path) -> None:
    """One of the processes; the others find it by a file."""
    variables: dict[str, Any] = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": count,
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # which accelerate wants to see, and nobody uses
    os.environ |= {**FSDP, **{name: str(value) for name, value in variables.items()}}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=count)
    with ranks.joined():
        backbone = ranks.each(lambda: load_backbone(ModelSettings(model=model, device="cpu")))
        parts = [weight for weight in backbone.blocks.parameters() if isinstance(weight, DTensor)]
        assert len(parts) == len([*backbone.blocks.parameters()])
        found = passes(backbone, folder / "trained")
        found["held"] = torch.tensor([sum(part.to_local().numel() for part in parts)])
        with suppress(ranks.SharedError):
            ranks.by_first(lambda: backbone.take_part())
            raise AssertionError("the others would never have run this pass")
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{number}.safetensors")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_parts_of_the_model_compute_what_one_with_all_of_it_does(backbone, model_folder, tmp_path):
    wanted = passes(backbone, tmp_path / "one")
    members = [SERVER.Process(target=member, args=(n, 2, str(model_folder), tmp_path), daemon=True) for n in range(2)]
    for process in members:
        process.start()
    for process in members:
        process.join()
    assert [process.exitcode for process in members] == [0, 0]
    whole = sum(weight.numel() for weight in backbone.blocks.parameters())
    for number in range(2):
        found = load_file(tmp_path / f"{number}.safetensors")
        assert int(found.pop("held")) == whole // 2
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            close(found[name], tensor)


CONFIGURATION = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "main_process_port": 0,
    "mixed_precision": "no",
    "rdzv_backend": "static",
    "same_network": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}


ZERO_CONFIGURATION = {
    **{name: value for name, value in CONFIGURATION.items() if name != "fsdp_config"},
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {
        "zero_stage": 3,
        "zero3_init_flag": True,
        "offload_param_device": "none",
        "offload_optimizer_device": "none",
    },
}


def launching(configuration: dict[str, Any], words: list[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return what accelerate's launcher is started by, or what it starts and in which environment, where that is
    DeepSpeed's: for that one it wants DeepSpeed installed, which Coterie does not need."""
    file = folder / "accelerate.yaml"
    file.write_text(yaml.dump(configuration))
    words = ["-m", "coterie", *words]
    if "fsdp_config" in configuration:
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
        return [*launch, *words], {**os.environ}
    asked, told, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), *words]))
    asked.deepspeed_fields_from_accelerate_config = ",".join(told.deepspeed_config)
    _, variables = prepare_deepspeed_cmd_env(asked)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words], variables


@pytest.mark.slow
@pytest.mark.parametrize("configuration", [CONFIGURATION, ZERO_CONFIGURATION], ids=["FSDP", "ZeRO-3"])
def test_accelerate_launch_makes_the_files_of_one_process(configuration, model_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", tiny.make_rows(18))
    flags = {"clusters": 2, "rank": 4, "epochs": 1, "expert_epochs": 1, "batch_size": 4, "micro_batch_size": 2}
    flags |= {"learning_rate": 1e-2, "d_proj": 64, "feature_batch_size": 8, "device": "cpu"}
    elrea(str(model_folder), str(rows), output=tmp_path / "one", **flags)
    words = ["fit", "elrea", "--model", model_folder, "--data", rows, "--output", tmp_path / "two"]
    words += [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    launch, variables = launching(configuration, [*map(str, words)], tmp_path)
    ended = subprocess.run(launch, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert yaml.safe_load((tmp_path / "two" / "run.yaml").read_text())["processes"] == 2
    for told in (
        "2 processes do this together, each with a part of the base model",
        "training base: each of 2 processes takes 2 of the 4 rows of a step",
        "experts of cluster: all 2 processes do each of the 2 together",
    ):
        assert told in ended.stderr
