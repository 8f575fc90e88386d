"""What several test files need alike: tables of cases, random tensors, adapters on disk, a command's refusal."""

import copy
import importlib.util
import json
import os
import re
import socket
import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from coterie.data.batching import TokenRow
from coterie.experts import bank
from coterie.experts.bank import CONFIG_FILE
from coterie.features.gradient import AdamState
from coterie.features.projection import Projection
from coterie.mixture import Completion


def adapters_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters that were read are in memory, each time that a bank reads one."""
    loaded: list[weakref.ref] = []
    alive: list[int] = []
    load = bank.load_adapter

    def counted(folder: Path, model: nn.Module) -> dict:
        adapter = load(folder, model)
        loaded.append(weakref.ref(next(iter(adapter.values())).up))
        alive.append(sum(one() is not None for one in loaded))
        return adapter

    monkeypatch.setattr(bank, "load_adapter", counted)
    return alive


def unused_port() -> int:
    """A port that nobody has now, of those that the system gives to nobody who asks for any: it stays free."""
    for port in range(20_000 + 16 * os.getpid() % 12_000, 32_768):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def script(path: str) -> ModuleType:
    """A script of the project that is no part of the package, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", Path(__file__).parents[1] / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def table(*rows: tuple) -> list:
    """One test case a row: its name, then the arguments."""
    return [pytest.param(*rest, id=name) for name, *rest in rows]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows of length 1."""
    return normalize(normal(rows, width, seed=seed), dim=1)


def close(one: Any, other: Any) -> None:
    """Equal up to what another order of the same sums makes of float32."""
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-3, atol=1e-4)


def same_answers(found: Iterable[Completion], wanted: Iterable[Completion]) -> None:
    """The same tokens, with close log-probabilities."""
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        close(one.logprobs, other.logprobs)


def save_adapter(model: PreTrainedModel, folder: Path, config: dict[str, Any], seed: int = 0) -> PeftModel:
    """A PEFT adapter with random factors on a copy of the base model, saved by PEFT itself."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted.eval()


def adams_step(parameter: nn.Parameter, gradient: torch.Tensor, name: str, state: AdamState) -> torch.Tensor:
    """What torch's own Adam takes off a parameter, from a saved state."""
    twin = nn.Parameter(parameter.detach().clone())
    twin.grad = gradient
    optimizer = torch.optim.Adam([twin], lr=state.learning_rate, betas=state.betas, eps=state.eps)
    mean, square = (tensor.clone() for tensor in state.moments[name])
    optimizer.state[twin] = {"step": torch.tensor(float(state.steps)), "exp_avg": mean, "exp_avg_sq": square}
    optimizer.step()
    return (parameter - twin).detach()


def peft_factors(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """PEFT's own model of an adapter, on a copy of the base model, and its factors by the names used here."""
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True).eval()
    plain = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p for n, p in adapted.named_parameters()
    }
    return adapted, {name: p for name, p in plain.items() if p.requires_grad}


def autograd_gradients(model, parameters, row: TokenRow) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss over the user's text, by ordinary autograd on one example alone."""
    for parameter in parameters.values():
        parameter.grad = None
    labels = torch.tensor([[token if own else -100 for token, own in zip(row.ids, row.is_user_text, strict=True)]])
    model(input_ids=torch.tensor([row.ids]), labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


class KeepsEverything(Projection):
    """A projection that projects nothing: it lays the named tensors out one after the other."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.offsets, self.d_proj = {}, 0
        for name, size in sizes.items():
            self.offsets[name] = self.d_proj
            self.d_proj += size

    def __call__(self, name, values):
        result = values.new_zeros(len(values), self.d_proj)
        result[:, self.offsets[name] : self.offsets[name] + values.shape[1]] = values
        return result


def rewrite_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put(*keys: str | int, value: object):
    """A function that changes one field of a record in place; `keys` lead to it."""

    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def refused(result: tuple[int, str, str], *patterns: str) -> None:
    """The command ended with 2 and one line on stderr that holds the patterns, and said nothing else."""
    code, out, err = result
    assert code == 2 and out == "", result
    lines = [line for line in re.split(r"[\r\n]+", err) if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]


def pairs_that_gain_nothing(nll: torch.Tensor) -> torch.Tensor:
    """Losses of all even pairs of experts, where mixing two gains nothing over the mean of theirs."""
    return (nll[:, :, None] + nll[:, None, :]) / 2
