"""The commands on mixtures, one per public function, in the order in which help lists them; `main` runs one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import coterie
from coterie.artifacts import as_path, check_file, write_answers
from coterie.cli.process import finish
from coterie.cli.table import AsJson, app, command, echo
from coterie.errors import CoterieError
from coterie.progress import steps
from coterie.records.wording import columns
from coterie.settings.auto import AutoSettings, KshotAutoSettings
from coterie.settings.commands import (
    ElreaSettings,
    EvaluationSettings,
    ExportSettings,
    FromAdaptersSettings,
    GenerateSettings,
    KshotSettings,
    PlanSettings,
    RouteSettings,
    SymbolicSettings,
    TokenLevelSettings,
    TrainExtrasSettings,
)
from coterie.settings.groups import NEVER, rerouting_interval
from coterie.settings.hub import PushSettings
from coterie.settings.reading import changed
from coterie.settings.serving import ServeSettings

NEARLY_EVEN = 0.1  # weights that differ from even ones by less
Prompts = Annotated[list[str] | None, typer.Argument(help="prompts; a conversation or many prompts: see --input")]
Input = Annotated[str | None, typer.Option(help="JSONL file with a prompt a line, in the forms that training data has")]


@command("methods", "coterie methods --json")
def list_methods(as_json: AsJson = False) -> None:
    """List the methods: where their experts come from, how prompts find them, where they meet."""
    rows = coterie.methods.listed()
    heads = ("on", "method", "combiner", "router", "bank")
    table = columns([heads, *([row[head] for head in heads] for row in rows)], "<<<<<")
    echo("\n".join(map(json.dumps, rows)) if as_json else table)


@command("fit elrea", "coterie fit elrea --model smollm2-135m --data train.jsonl --output runs/elrea")
def fit_elrea(settings: ElreaSettings) -> None:
    """Fit an ensemble of low-rank expert adapters: base adapter, gradient clusters, one expert each (2502.00089)."""
    echo(_made(coterie.methods.fit_elrea(settings)))


@command("fit auto", "coterie fit auto --model smollm2-135m --data train.jsonl --output runs/auto --budget 1000000")
def fit_auto(settings: AutoSettings) -> None:
    """Fit experts to one data set, and choose router, combiner or no mixture by evidence; auto.md tells why."""
    coterie.fit_auto(settings)
    echo((as_path(settings.output) / "auto.md").read_text(encoding="utf-8").rstrip())


@command(
    "fit token-level",
    "coterie fit token-level --model smollm2-135m --output runs/tle --data maths=gsm8k.jsonl --data code=code.jsonl",
)
def fit_token_level(settings: TokenLevelSettings) -> None:
    """Train an adapter for each domain and route by the text so far, at every n-th token (2311.10847)."""
    echo(_made(coterie.methods.fit_token_level(settings)))


@command("fit from-adapters", "coterie fit from-adapters --bank bank/ --output runs/shelf")
def fit_from_adapters(settings: FromAdaptersSettings) -> None:
    """Make a mixture of adapters that exist already, routed by similarity to the texts that each was made for."""
    echo(_made(coterie.methods.fit_from_adapters(settings)))


@command(
    "fit kshot-moe", "coterie fit kshot-moe --bank bank/ --shots shots.jsonl --pool dolly.jsonl --output runs/task"
)
def fit_kshot(settings: KshotSettings) -> None:
    """Make a task's mixture from a few examples, a bank of adapters and open data (2408.15915)."""
    echo(_made(coterie.methods.fit_kshot(settings)))


@command(
    "fit kshot-auto", "coterie fit kshot-auto --bank bank/ --shots shots.jsonl --pool dolly.jsonl --output runs/task"
)
def fit_kshot_auto(settings: KshotAutoSettings) -> None:
    """Choose for a task by left-out examples: one adapter, several, or trained, on what; auto.md tells why."""
    coterie.fit_kshot_auto(settings)
    echo((as_path(settings.output) / "auto.md").read_text(encoding="utf-8").rstrip())


@command("fit symbolic-moe", "coterie fit symbolic-moe --experts experts/ --output runs/sym")
def fit_symbolic(settings: SymbolicSettings) -> None:
    """Recruit profiled experts by skills, and choose the aggregator of their answers (Chen et al. 2025)."""
    fitted = coterie.methods.fit_symbolic(settings)
    echo(f"{settings.output}: {len(fitted.pool.names)} experts, {fitted.aggregator} makes one answer of theirs")


@command("train-extras", "coterie train-extras runs/elrea --methods mole,lora-ensembles --ensemble-size 4")
def train_extras(settings: TrainExtrasSettings) -> None:
    """Train what methods need beyond a fitted run, once, into the run's folder; eval then takes it as it is."""
    for name, extra in coterie.methods.train_extras(settings).items():
        count = len(extra.bank)
        echo(f"{extra.folder}: {name}, {count} expert{'' if count == 1 else 's'}, {extra.seconds} s of training")


@command("route", 'coterie route runs/elrea "What do 5 pens cost?" --json')
def route(settings: RouteSettings, prompts: Prompts = None, as_json: AsJson = False, input: Input = None) -> None:
    """Print the weights of the experts for every prompt."""
    given = _prompts(prompts, input, settings)
    mixture = _mixture(settings)
    routing = mixture.route(given, settings.routing.top_k_experts)
    for number, prompt in enumerate(given):
        text = prompt if isinstance(prompt, str) else prompt.instruction
        weights = routing.row(number)
        similarities = {name: float(values[number]) for name, values in routing.similarities.items()}
        if as_json:
            echo(json.dumps({"prompt": text, "weights": weights, "similarities": similarities}))
            continue
        echo(text)
        for name, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
            cosine = f"  cosine {similarities[name]:+.3f}" if name in similarities else ""
            echo(f"  {name:12} {weight:.3f} {'#' * round(40 * weight / (sum(weights.values()) or 1))}{cosine}")
    if routing.gates is not None:
        echo(_of_gates(routing), err=True)


@command("generate", 'coterie generate runs/elrea "What do 5 pens cost?" --stream')
def generate(
    settings: GenerateSettings,
    prompts: Prompts = None,
    as_json: AsJson = False,
    stream: Annotated[bool, typer.Option(help="print the text while it is written")] = False,
    show_weights: Annotated[bool, typer.Option(help="draw the experts' weights at every token")] = False,
    input: Input = None,
) -> None:
    """Answer prompts with the mixture."""
    _check_shown(settings, stream=stream, as_json=as_json, show_weights=show_weights)
    if settings.output:
        check_file(as_path(settings.output), settings, [input] if input else [])
    given = _prompts(prompts, input, settings)
    if coterie.methods.is_symbolic(settings.mixture):
        if stream or show_weights:
            flag = "--stream" if stream else "--show-weights"
            raise CoterieError(f"recruited experts finish their answers before one is made, so leave {flag} out")
        if settings.sampling.top_logprobs:
            raise CoterieError("recruited experts answer in text alone, so leave --top-logprobs out")
        _check_engine(settings)
        return _show(coterie.methods.generate_symbolic(settings, given), settings, as_json=as_json)
    if given_elsewhere := changed(settings.serving):
        raise CoterieError(f"{given_elsewhere[0]} acts on runs of symbolic-moe only; leave it out")
    options = {"top_k_experts": settings.routing.top_k_experts, **settings.sampling.model_dump()}
    with _answering(settings) as mixture:
        if stream:
            for prompt in given:
                for token in mixture.stream(prompt, **options):
                    echo(token.text, nl=False)
                echo()
            return None
        with steps("answers" if len(given) > 1 else "", len(given), "prompt") as done:
            asked = {"n": settings.n, "batch_size": settings.batch_size, "progress": done, **options}
            answers = mixture.generate(given, **asked)
    named = [{"id": one.id} if input else {} for one in given for _ in range(len(answers) // len(given))]
    records = [{**name, **answer.record()} for name, answer in zip(named, answers, strict=True)]
    if settings.output:
        write_answers(as_path(settings.output), records)
    _show(records, settings, as_json=as_json, show_weights=show_weights)
    return None


@command("plan", "coterie plan runs/sym --input questions.jsonl")
def plan(settings: PlanSettings, prompts: Prompts = None, as_json: AsJson = False, input: Input = None) -> None:
    """Tell what recruited experts will take to answer: loads, calls, tokens and memory; nothing is loaded."""
    _check_engine(settings)
    found = coterie.methods.plan_symbolic(settings, _prompts(prompts, input, settings))
    echo(json.dumps(found.record()) if as_json else str(found))


@command("export", "coterie export runs/elrea --for vllm --output runs/elrea-vllm")
def export(settings: ExportSettings, as_json: AsJson = False) -> None:
    """Write the experts, or one static mixture of them, as vLLM, PEFT or llama.cpp reads them."""
    exported = coterie.export_mixture(settings)
    echo(json.dumps(exported.record()) if as_json else str(exported))


@command("push", "coterie push runs/elrea OWNER/NAME --licence apache-2.0 --evaluation runs/elrea-eval")
def push(settings: PushSettings) -> None:
    """Publish a mixture or a bank on the model hub, with a card; it is private unless --public."""
    echo(coterie.push(settings))


@command("serve", "coterie serve runs/elrea --port 8000")
def serve(settings: ServeSettings) -> None:
    """Answer over HTTP, as OpenAI's API has it, with experts mixed for every request."""
    coterie.run_server(settings)


@command("eval", "coterie eval runs/elrea --data test.jsonl --output runs/eval --methods base,elrea,uniform-weights")
def evaluate(settings: EvaluationSettings, as_json: AsJson = False) -> None:
    """Compare methods on held-out rows: exact match and likelihood, with intervals of the difference to a control."""
    result = coterie.evaluate_folder(settings)
    echo(json.dumps(result.summary) if as_json else str(result))


@command("report", "coterie report runs/eval")
def report(
    evaluation: Annotated[Path, typer.Argument(help="folder that `coterie eval` wrote")],
    overwrite: Annotated[bool, typer.Option(help="replace another report.html that is there")] = False,
) -> None:
    """Write the report of an evaluation as one HTML file and print its path."""
    echo(coterie.write_report(evaluation, overwrite=overwrite))


@command("spread", "coterie spread runs/eval-0 runs/eval-1 runs/eval-2")
def spread(
    evaluations: Annotated[list[Path], typer.Argument(help="folders that `coterie eval` wrote, one for each seed")],
    as_json: AsJson = False,
) -> None:
    """Show how far results vary between mixtures fitted with other seeds and evaluated on the same rows."""
    rows = coterie.read_spread(evaluations)
    echo("\n".join(map(json.dumps, rows)) if as_json else coterie.format_spread(rows))


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    """Train, select, route, combine and serve LoRA experts for language models."""
    if version:
        echo(coterie.__version__)
        raise typer.Exit


def _prompts(prompts: list[str] | None, file: str | None, settings: RouteSettings) -> list[Any]:
    if bool(prompts) == bool(file):
        raise CoterieError("give prompts either as arguments or with --input FILE.jsonl")
    if not file:
        given = list(prompts or [])
        if len(given) > 1 and not any(" " in one for one in given):
            echo(f"{len(given)} prompts of one word each; put quotes around a prompt of several words", err=True)
        return given
    reading = coterie.reading_for(settings.mixture, settings.reading)
    return coterie.load_examples(file, need_response=False, reading=reading)


def _check_shown(settings: GenerateSettings, *, stream: bool, as_json: bool, show_weights: bool) -> None:
    if stream + (as_json or bool(settings.output)) + show_weights > 1:
        ways = "--stream, --json, --output and --show-weights"
        raise CoterieError(f"{ways} give answers in different ways; use one of them")
    if stream and settings.n > 1:
        raise CoterieError(f"--stream prints one answer while it is written, not {settings.n}; leave --n out")
    if settings.sampling.top_logprobs and not (as_json or settings.output):
        raise CoterieError("--top-logprobs stands in the answers' JSON objects; add --json or --output")


def _show(
    records: list[dict[str, Any]], settings: GenerateSettings, *, as_json: bool, show_weights: bool = False
) -> None:
    """Print answers, or tell where they were written."""
    if settings.output:
        echo(f"{settings.output}: {len(records)} answers")
        return
    for record in records:
        echo(json.dumps(record, ensure_ascii=False) if as_json else record["text"])
        if show_weights:
            coterie.print_weights(record)


def _mixture(settings: RouteSettings) -> Any:
    mixture = coterie.Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump())
    routing = settings.routing
    if routing.method:
        mixture = coterie.methods.load_grid(mixture, [routing.method]).cell(routing.method)
    if routing.cache and rerouting_interval(routing.every or NEVER) is None:
        raise CoterieError("--cache says how to re-route; add --every N")
    if not routing.every:
        return mixture.replace(router=routing.router, combiner=routing.combiner)
    every = rerouting_interval(routing.every)
    return mixture.replace(router=routing.router).rerouted(every, cache=routing.cache, combiner=routing.combiner)


def _check_engine(settings: GenerateSettings) -> None:
    if given := changed(settings.engine):
        raise CoterieError(f"{given[0]} acts on a mixture of adapters, not on recruited experts; leave it out")


def _of_gates(routing: Any) -> str:
    """Tell what the weights of gates are, and why those that are read off the adapters are often nearly even."""
    told = "these weights are averages over all tokens and layers, each of which has its own"
    even = float((routing.weights - 1 / len(routing.experts)).abs().max()) < NEARLY_EVEN
    if even and routing.gates.score in ("arrow", "spectr"):
        told += (
            f"; {routing.gates.score} often weighs experts nearly alike, also where they are unlike: texts that each "
            "was made for (coterie fit from-adapters --centroid-data NAME=FILE) tell them apart better"
        )
    return told


@contextmanager
def _answering(settings: GenerateSettings) -> Iterator[Any]:
    """Give what answers: the mixture itself, or llama.cpp in its place until the `with` ends."""
    if settings.engine.engine == "coterie":
        yield _mixture(settings)
        return
    coterie.LlamaCpp.library()  # before anything is loaded
    with coterie.LlamaCpp(_mixture(settings), settings.engine.gguf) as answering:
        yield answering


def _made(mixture: Any) -> str:
    return f"{mixture.folder}: {len(mixture.bank)} experts ({', '.join(mixture.bank.names)})"


def main() -> None:
    """Run the command line."""
    finish(lambda words: app(words, prog_name="coterie", standalone_mode=False))
