"""The command line: parse and call. What a command does is in qwenspec.commands, imported when it runs."""

from __future__ import annotations

import functools
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import qwenspec
from qwenspec.commands import console, interrupt
from qwenspec.commands.console import guarded
from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError
from qwenspec.files import check_place

GENERATED = Path("generated")
MOST = 2**31 - 1  # tokens and sequences

app = typer.Typer(
    name="qwenspec",
    help="A compiler from YAML specs of Qwen variants to standalone implementations.",
    epilog="SPEC is file.yaml, file.yaml#variant, a checkpoint folder, or a name that `qwenspec list` shows. "
    "Exit codes: 0 done, 1 a check said no, 2 bad usage, spec or checkpoint, no memory or no room, 3 a backend is not "
    "installed, 70 a bug in qwenspec, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich doubles the time to start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Precision(StrEnum):
    """What `--dtype` may be."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Scheme(StrEnum):
    """What `convert --quantization` may be."""

    int8 = "int8"
    int4 = "int4"


class Head(StrEnum):
    """What `convert --head` may be."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


def main() -> None:
    """The entry point of the `qwenspec` command."""
    interrupt.obey()
    console.prepare()
    sys.exit(console.outcome(functools.partial(app, prog_name="qwenspec")))


def _version(asked: bool) -> None:
    if asked:
        console.show(f"qwenspec {qwenspec.__version__}")
        raise typer.Exit()


def _share(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value:g} is not above 0 and at most 1.")
    return value


def _backends(incomplete: str) -> list[str]:
    from qwenspec.backend.registry import installed

    return [name for name in installed() if name.startswith(incomplete)]


def _specs(incomplete: str) -> list[str]:
    """`file.yaml#` and the names of what comes with qwenspec are completed here, `file` by the shell."""
    from qwenspec.spec import bundled
    from qwenspec.spec.load import variants

    file, mark, start = incomplete.partition("#")
    if not mark:
        prefixed = [f"{bundled.PREFIX}{file}" for file in bundled.files()]
        return [name for name in (*bundled.variants(), *prefixed) if incomplete and name.startswith(incomplete)]
    try:
        return [f"{file}#{name}" for name in variants(file) if name.startswith(start)]
    except SpecError:
        return []


def _spec(name: str = "SPEC") -> Any:
    help_ = "file.yaml, file.yaml#variant, a checkpoint folder, or a name that `qwenspec list` shows"
    return typer.Argument(metavar=name, help=help_, autocompletion=_specs)


Spec = Annotated[str, _spec()]
Variant = Annotated[str | None, typer.Option("--variant", "-v", help="Default: the file's default_variant.")]
Backend = Annotated[str, typer.Option("--backend", "-b", help="See `qwenspec backends`.", autocompletion=_backends)]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", "-w", metavar="DIR", help="Hugging Face checkpoint folder. Default: SPEC, if it is one."),
]
Context = Annotated[
    int | None, typer.Option("--context", metavar="L", min=1, max=MOST, help="Tokens of a sequence. Default: 4096.")
]
Degree = Annotated[int, typer.Option("--tp", metavar="N", help="Tensor-parallel ranks.")]
Dtype = Annotated[Precision | None, typer.Option(help="Default: the spec's.")]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout.")]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --------------------------------------------------------------------------------------------------- packages


@app.command()
@guarded
def gen(
    spec: Annotated[str | None, _spec()] = None,
    backend: Backend = "triton",
    variant: Variant = None,
    quantization: Annotated[str | None, typer.Option(metavar="SCHEME", help="Instead of the spec's.")] = None,
    kv_cache: Annotated[str | None, typer.Option(metavar="SCHEME", help="Instead of the spec's.")] = None,
    tp: Degree = 1,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where packages go.")] = GENERATED,
    all_: Annotated[bool, typer.Option("--all", help="Everything in DIR/manifest.yaml.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what differs, and exit 1.")] = False,
    as_json: Json = False,
) -> ExitCode | None:
    """Write the package of a spec."""
    from qwenspec.commands import packages
    from qwenspec.commands.specs import pick

    if all_ != (spec is None) or (all_ and (variant or quantization or kv_cache or tp != 1)):
        problem = "`gen --all` takes no SPEC and no variant" if all_ else "`gen` needs a SPEC, or --all"
        raise SpecError([Diagnostic("usage", problem, hint="qwenspec gen --help")])
    if spec is None:
        jobs = packages.committed(out)
    else:
        jobs = [packages.Job(pick(spec, variant, quantization, kv_cache), backend, out)]
        packages.check_degree(jobs[0], tp)
    strays = packages.stray(out, jobs) if all_ else []
    if check:
        return packages.compare(jobs, strays, as_json)
    written = packages.write(jobs)
    console.result(written, packages.written_text, as_json)
    packages.warn(strays)
    if tp > 1:
        packages.say_how(jobs[0], tp)
    return None


@app.command()
@guarded
def backends(as_json: Json = False) -> None:
    """What is installed, on what it runs here, and why not."""
    from qwenspec.commands import environment

    console.result(environment.backends(), environment.backends_text, as_json)


# ---------------------------------------------------------------------------------------------- writing specs


@app.command()
@guarded
def validate(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="Files, or names of variants.")],
    as_json: Json = False,
) -> ExitCode:
    """Every mistake in every file, each with its place and a way out."""
    from qwenspec.commands import authoring

    return authoring.validate(specs, as_json)


@app.command()
@guarded
def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write it there.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say how FILE differs, and exit 1.")] = False,
) -> ExitCode:
    """The JSON Schema of specs, for editors."""
    from qwenspec.commands import authoring

    return authoring.schema(out, check)


@app.command("import")
@guarded
def import_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="config.json, or a checkpoint folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="SPEC", help="Default: stdout.")] = None,
    name: Annotated[str | None, typer.Option(help="The variant's name. Default: the folder's.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that nobody needs, such as `*.inv_freq`.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite SPEC.")] = False,
    as_json: Json = False,
) -> None:
    """The spec of a Hugging Face config. A key that nobody reads is an error."""
    from qwenspec.commands import authoring

    authoring.import_spec(config, name, ignore or [], out, force, as_json)


@app.command()
@guarded
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face checkpoint folder.")],
    quantization: Annotated[Scheme, typer.Option("--quantization", "-q", help="What to round to.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The new checkpoint's folder.")],
    group_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Inputs that share a scale of int4. Default: 32.")
    ] = None,
    head: Annotated[Head | None, typer.Option(help="The LM head, and a tied embedding. Default: int8.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="Stays in full precision: a name, its beginning or end.")
    ] = None,
    spec: Annotated[str | None, typer.Option(metavar="SPEC", help="Default: what config.json says.")] = None,
    shard_size: Annotated[float, typer.Option(min=1e-6, max=1e6, metavar="GB", help="The largest file.")] = 5,
    as_json: Json = False,
) -> None:
    """Quantise a checkpoint. An interrupted run goes on where it stopped."""
    from qwenspec.commands import convert as command

    quantized = command.Options(quantization.value, group_size, head and head.value, tuple(skip or ()))
    command.run(checkpoint, spec, quantized, out, round(shard_size * 10**9), as_json)


# ---------------------------------------------------------------------------------------------- reading specs


@app.command("list")
@guarded
def list_(
    file: Annotated[str | None, typer.Argument(metavar="SPEC", help="Default: what comes with qwenspec.")] = None,
    as_json: Json = False,
) -> None:
    """The variants that come with qwenspec, those of a file, or one that is named."""
    from qwenspec.commands import listing

    console.result(listing.variants(file), listing.variants_text, as_json)


@app.command()
@guarded
def show(
    spec: Spec,
    variant: Variant = None,
    ir: Annotated[bool, typer.Option("--ir", help="The whole resolved program instead.")] = False,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Sizes, parameters, bytes and FLOPs a token."""
    from qwenspec.commands import describe
    from qwenspec.commands.specs import pick

    picked = pick(spec, variant)
    if ir and as_json:
        console.show_json(describe.program(picked))
    elif ir:
        console.show(describe.program_text(picked))
    else:
        console.result(describe.show(picked, context), describe.show_text, as_json)


@app.command()
@guarded
def diff(a: Annotated[str, _spec("A")], b: Annotated[str, _spec("B")], as_json: Json = False) -> None:
    """What changes from one model to another."""
    from qwenspec.commands import compare
    from qwenspec.commands.specs import pick

    before, after = pick(a), pick(b)
    if as_json:
        console.show_json(compare.differences(before, after))
    else:
        console.show(compare.differences_text(before, after))


@app.command()
@guarded
def plan(
    spec: Spec,
    tp: Degree = 1,
    context: Context = None,
    batch: Annotated[int, typer.Option("--batch", metavar="B", min=1, max=MOST, help="Sequences.")] = 1,
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Each rank's shapes and memory, or why the degree is illegal."""
    from qwenspec.commands import describe
    from qwenspec.commands.specs import pick

    console.result(describe.plan(pick(spec, variant), tp, context, batch), describe.plan_text, as_json)


# ---------------------------------------------------------------------------------------------------- running


@app.command()
@guarded
def run(
    spec: Spec,
    weights: Weights = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Again for a batch; -: standard input.")
    ] = None,
    variant: Variant = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are messages to the chat template; without one, a line is a turn.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system's message, with --chat.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="What the chat template is told, if anything.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 128.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy. Default: generation_config.json's, else 0.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(callback=_share, help="Only the likeliest, up to p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; again for more.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens, why they ended, and how fast they came.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Dtype = None,
    backend: Backend = "triton",
    tp: Degree = 1,
    as_json: Json = False,
) -> None:
    """Generate text, streamed."""
    from qwenspec.commands import execute
    from qwenspec.commands.specs import pick, weights_of

    picked = pick(spec, variant)
    folder = weights_of(spec, weights)
    options = {
        "max-tokens": max_tokens,
        "temperature": temperature,
        "top-k": top_k,
        "top-p": top_p,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "prompt": prompt,
        "stop": stop,
        "system": system,
        "chat": chat,
        "thinking": thinking is True,
        "no-thinking": thinking is False,
        "stats": stats,
        "json": as_json,
    }
    arguments = execute.arguments(options)
    if tp == 1:
        execute.run(picked, backend, folder, device, arguments)
    else:
        execute.run_ranks(picked, backend, folder, device, arguments, tp)


@app.command()
@guarded
def logits(
    spec: Spec,
    ids: Annotated[str, typer.Option("--ids", metavar="1,2,3", help="Token ids.")],
    weights: Weights = None,
    variant: Variant = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.npy", help="float32 [n, vocab].")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Dtype = None,
    backend: Backend = "triton",
    as_json: Json = False,
) -> None:
    """The logits of every position."""
    from qwenspec.commands import execute
    from qwenspec.commands.specs import pick, weights_of

    tokens, picked = execute.token_ids(ids), pick(spec, variant)
    if out is not None:
        check_place(out)
    found = execute.logits(picked, backend, weights_of(spec, weights), tokens, device, dtype)
    if out is not None:
        execute.save(out, found)
    if out is None or as_json:
        console.result(execute.likeliest(tokens, found), execute.likeliest_text, as_json)


# ------------------------------------------------------------------------------------------------------ proof


@app.command()
@guarded
def verify(
    spec: Annotated[str | None, _spec()] = None,
    variant: Variant = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", "-b", help="Default: all that can run here. On two ranks: triton@2.", autocompletion=_backends
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", "-w", metavar="DIR", help="A checkpoint, at full size.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page of what was found.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Default: 20, or 3 with --weights.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    dtype: Annotated[list[Precision] | None, typer.Option(help="Default: float32 and the spec's.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cpu.")] = None,
    failures: Annotated[Path, typer.Option(metavar="DIR", help="Where a failure's folder goes.")] = Path("failures"),
    replay: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Run a failure's folder again.")] = None,
    as_json: Json = False,
) -> ExitCode:
    """Compare the backends with a float64 reference and with each other, on random workloads."""
    from qwenspec.commands import specs
    from qwenspec.commands import verify as command

    if (replay is None) == (spec is None):
        problem = "`verify` takes a SPEC or --replay FOLDER"
        raise SpecError([Diagnostic("usage", problem, hint="qwenspec verify --help")])
    if spec is None:
        assert replay is not None
        return command.replay(replay, as_json)
    return command.run(
        spec,
        report,
        as_json,
        variant=variant,
        backend=backend,
        weights=weights and specs.folder(weights),
        examples=examples,
        seed=seed,
        dtype=dtype,
        device=device,
        failures=failures,
    )
