"""The commands. No logic: each names its options, imports the room that does the work, and hands over.

Imports are inside the commands, so that `whimbrel --help` is quick and needs no torch. `main` turns every mistake into
one line: exit code 2 for what the user can mend, 1 for what went wrong otherwise, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whimbrel import __version__
from whimbrel.errors import UserError
from whimbrel.explain import explain

if TYPE_CHECKING:
    from whimbrel.pipeline.console import Display

app = typer.Typer(
    name="whimbrel",
    help="Small language models that think, from raw pages to a served model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings; the last one wins.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a fetched model's name or a hub id.")
]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings in YAML.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str, typer.Option(help="Numbers to compute with: float32, float64, float16; on a GPU bfloat16, fp8.")]
StateDtype = Annotated[str, typer.Option(help="Recurrent states: float32, or float16, which halves them.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:1.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the CPU; 0 measures which number is fastest now.")]

STAGES = {
    "data": "raw pages to documents, with the reason of every drop.",
    "tokenizer": "a vocabulary learned from documents.",
    "tokens": "documents to token shards.",
    "farqa": "documents to long ones whose questions are answered far back.",
    "pretrain": "token shards to a model, from random weights or on from another.",
    "tasks": "problems with solutions and a verifier.",
    "sft": "a model and conversations to a model that answers.",
    "chat-tokens": "conversations to token shards, without training.",
    "pairs": "answers drawn from a model, ranked by their verifier.",
    "dpo": "pairs of answers to a model that prefers the better ones.",
    "reward": "rated answers to a model that rates.",
    "grpo": "prompts with a verifier to a model that is right more often.",
    "merge": "two models of one shape to the best point between them.",
    "compress": "a smaller model cut out of a large one, under a memory or a share of its parameters.",
    "distill": "a student learns from its teacher.",
    "evaluate": "problems answered by a model, scored, with intervals.",
    "speed": "tokens a second by what is remembered, beside a dense twin.",
    "sample": "texts written by a model.",
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"whimbrel {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose; goes anywhere.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, as recipes/first-flight.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to work; runs/NAME if not given.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Hosts that work together; srun says it by itself.")] = None,
    node_rank: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST[:PORT]", help="Where host 0 is met.")] = None,
) -> None:
    """Work through a recipe: every stage once, resumed where it stopped; writes report.html."""
    from whimbrel.pipeline import recipe as recipes
    from whimbrel.pipeline import run as runs
    from whimbrel.pipeline.console import Display

    graph = recipes.read(recipe, overrides or ())
    hosts = runs.Hosts.of(nodes, node_rank, rdzv_endpoint, os.environ, graph.hosts)
    typer.echo(f"report: {runs.run(graph, out or Path('runs') / graph.name, Display(), hosts)}")


@app.command()
def fetch(name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2")]) -> None:
    """Bring a real pretrained model into the cache, checked, with its licence."""
    from whimbrel.model import fetch as fetching

    typer.echo(fetching.fetch(name, _display().event))


@app.command()
def generate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help='JSONL: {"prompt": …} or {"messages": […]}.')],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Answers, one line each.")] = Path(
        "answers.jsonl"
    ),
    config: Config = None,
    dtype: Dtype = "float32",
    state_dtype: StateDtype = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Answer a file of prompts; stopped anywhere, the same command goes on.

    Settings: max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, stop_in_thinking, seed, logprobs,
    n, thinking_budget, thinking_grace, ignore_eos.
    """
    from whimbrel.config import load
    from whimbrel.engine import Sampling
    from whimbrel.engine.offline import check_files, generate_file
    from whimbrel.serve.loading import load_engine

    sampling = load(Sampling, config, overrides or ())
    check_files(prompts, out)
    display = _display()
    engine = load_engine(model, dtype, device, threads, display.event, state_dtype=state_dtype)
    display.start("generate")
    try:
        figures = generate_file(engine, prompts, out, sampling, name=model, report=display.event)
    finally:
        display.stop()
    typer.echo(f"{out}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()))


@app.command()
def chat(
    model: Model,
    overrides: Overrides = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this and leave.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    config: Config = None,
    dtype: Dtype = "float32",
    state_dtype: StateDtype = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Talk with a model in the terminal; `/help` there lists the commands. A pipe is answered line by line.

    Settings: those of `whimbrel generate`.
    """
    from whimbrel.config import load
    from whimbrel.engine import Sampling
    from whimbrel.serve.chat import chat as talk
    from whimbrel.serve.loading import load_engine

    sampling = load(Sampling, config, overrides or ())
    said = {"max_sequences": 1, "state_dtype": state_dtype}
    engine = load_engine(model, dtype, device, threads, _display().event, **said)
    raise typer.Exit(talk(engine, sampling, once=once, system=system))


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, recipe, folder, .gguf file, fetched name or hub id.")
    ],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="What the device has, for instance 22GiB.")],
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of a sequence, prompt and answer.")],
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Numbers of weights and cache; int8, int4, fp8.")] = "bfloat16",
    bandwidth: Annotated[
        str | None, typer.Option(metavar="RATE", help="For instance 600GB/s; measured here if not given.")
    ] = None,
    peak: Annotated[str | None, typer.Option(metavar="RATE", help="For instance 125TFLOP/s; for prompts.")] = None,
    reserve: Annotated[str | None, typer.Option(metavar="SIZE", help="Kept free for everything else.")] = None,
    state_dtype: StateDtype = "float32",
    train: Annotated[bool, typer.Option("--train", help="Plan training on rows of CONTEXT tokens instead.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say whether a model fits, with which batch and context, and how fast it could be at best.

    Settings, with --train: tokens, accumulate, recompute, mfu, causal, parallel.{data,fsdp,context,tensor}.
    """
    from whimbrel.pipeline import planning

    words: Any = {"batch": batch, "dtype": dtype, "peak": peak, "reserve": reserve}
    if train:
        made: Any = planning.train(model, memory, context, overrides or (), **words)
    elif overrides:
        raise planning.misplaced(overrides[0], {"memory", "context", "bandwidth", "state_dtype", *words})
    else:
        made = planning.run(model, memory, context, bandwidth=bandwidth, state_dtype=state_dtype, **words)
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else "\n".join(made.lines()))


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A preset (random weights), folder, .gguf file, fetched name, hub id."),
    ],
    context: Annotated[str, typer.Option(metavar="TOKENS,…", help="Lengths of prompts, and depths.")] = "512,4096",
    batch: Annotated[str, typer.Option(metavar="N,…", help="Sequences that decode together.")] = "1,4,16",
    dtype: Annotated[
        str, typer.Option(help="Weights: float32, int8, int4, fp8; CPU: float16; GPU: bfloat16.")
    ] = "float32",
    state_dtype: StateDtype = "float32",
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 leaves the number to torch.")] = 0,
    device: Annotated[str, typer.Option(help="Where to measure: cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how fast a model reads prompts and decodes, its shares of what is possible, and where the time goes."""
    from whimbrel.engine import bench as measuring

    lengths, sizes = measuring.numbers(context, "context"), measuring.numbers(batch, "batch")
    found = measuring.run(model, lengths, sizes, dtype, threads, _display().event, device, state_dtype)
    typer.echo(json.dumps(found, indent=2) if as_json else measuring.as_text(found))


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    to: Annotated[str, typer.Option(help="The form: gguf, one file for llama.cpp.")] = "gguf",
    kind: Annotated[str, typer.Option("--type", help="Numbers of the matrices: f32, f16, q8_0 or q4_0.")] = "f16",
) -> None:
    """Write a model in the form of another program, vocabulary and chat template included."""
    from whimbrel.model.gguf_write import write

    if to != "gguf":
        raise UserError(f"to is {to!r}; set --to to gguf")
    display = _display()
    display.start("convert")
    try:
        typer.echo(write(model, out, kind, display.event))
    finally:
        display.stop()


@app.command()
def quantize(
    model: Model,
    to: Annotated[str, typer.Option(help="int8 or int4.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write.")],
    group: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64 or 128.")] = 32,
    method: Annotated[str, typer.Option(help="rtn (to the nearest) or gptq (calibrated on --text).")] = "rtn",
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Plain text like what the model will read; may be given again."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Numbers to compute with: float32; float16 needs half the memory.")] = (
        "float32"
    ),
) -> None:
    """Write a model whose matrices have few bits; perplexity before and after stands in its card.

    The new folder is used as any other model is: `whimbrel chat FOLDER`.
    """
    from whimbrel.compress.quantize import quantize as work

    display = _display()
    display.start("quantize")
    try:
        made = work(model, out, to=to, group=group, method=method, texts=text or (), dtype=dtype, report=display.event)
    finally:
        display.stop()
    for name, value in made.facts(dtype).items():
        typer.echo(f"{name}: {value}")
    typer.echo(out)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can do, which fast paths are active, and why not the others."""
    from whimbrel import doctor as examining

    found = examining.examine()
    typer.echo(json.dumps(found, indent=2) if as_json else examining.as_text(found))


Inputs = Annotated[list[str] | None, typer.Option("--input", metavar="NAME=PATH", help="An input.")]
Out = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to work; runs/STAGE if not given.")]
Show = Annotated[bool, typer.Option("--show", help="Print the settings, defaults and all, and stop.")]


def _work(
    kind: str, config: Path | None, overrides: Sequence[str], inputs: Sequence[str], out: Path | None, show: bool
) -> None:
    """Run one stage, or show its settings."""
    from whimbrel.pipeline import single

    if show:
        typer.echo(single.show(kind, config, overrides), nl=False)
    else:
        typer.echo(single.run(kind, config, overrides, inputs, out))


def _stage(kind: str) -> None:
    """Add the command that runs one kind of stage alone."""

    def command(
        overrides: Overrides = None, config: Config = None, inputs: Inputs = None, out: Out = None, show: Show = False
    ) -> None:
        _work(kind, config, overrides or (), inputs or (), out, show)

    _say(kind, command)


def _say(kind: str, command: Callable[..., None]) -> None:
    command.__doc__ = f"Stage: {STAGES[kind]}\n\nSettings: `whimbrel {kind} --show` prints them all."
    app.command(kind)(command)


def _compress(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="What to cut: as for `whimbrel chat`.")] = None,
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="What serving may take, as 22GiB.")] = None,
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="Of a sequence in that memory.")] = None,
    config: Config = None,
    inputs: Inputs = None,
    out: Out = None,
    show: Show = False,
) -> None:
    said = [] if model is None or "=" not in model else [model]
    said += [f"{name}={value}" for name, value in (("memory", memory), ("context", context)) if value is not None]
    given = list(inputs or ())
    if model is not None and "=" not in model:
        from whimbrel.model.checkpoint import resolve

        given.append(f"model={resolve(model)}")
    _work("compress", config, [*said, *(overrides or ())], given, out, show)


for _kind in STAGES:
    if _kind == "compress":
        _say(_kind, _compress)
    else:
        _stage(_kind)


def _display() -> Display:
    """For commands whose standard output is the result: everything else goes to standard error."""
    from rich.console import Console

    from whimbrel.pipeline.console import Display

    return Display(Console(stderr=True, highlight=False, soft_wrap=True))


# ---------------------------------------------------------------------------------------------------------- errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        code = typer.main.get_command(app).main(words, prog_name="whimbrel", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if traceback:
            raise
        message, code = explain(error, list(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
        print(f"whimbrel: {message}", file=sys.stderr)
        return code
    if code == 130:  # typer's word for Ctrl-C
        print("whimbrel: stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
    return code if isinstance(code, int) else 0
