"""The command line: parse, import, call, print."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nanorun.errors import RankLost, RunFailed, Stopped, StoppedEarly, UserError, shown

if TYPE_CHECKING:
    from rich.console import Console

    from nanorun.launch import Training

app = typer.Typer(
    name="nanorun",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Which way of training a small language model is fastest, and how sure is that.\n\n"
    "First steps: nanorun prepare-data; nanorun train; nanorun report",
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
"""What typer exits with after Ctrl-C: the shells' 128 + SIGINT."""

TRACKS = (
    "sotu, shakespeare-sprint, shakespeare, text, fineweb-small, fineweb-small-optim, fineweb-medium, or a "
    "folder of yours under ./configs"
)
DataDir = Annotated[Path, typer.Option("--data", help="Folder of prepared data.")]
RecordsDir = Annotated[Path, typer.Option("--records", help="Folder of records.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")]
Curves = Annotated[
    bool | None,
    typer.Option(
        "--curves/--no-curves", help="Small curves under the table; by default on a terminal alone."
    ),
]


@app.command("prepare-data", epilog="Example: nanorun prepare-data text --input notes/ --train-bpe 4096")
def prepare_data(
    corpus: Annotated[
        str,
        typer.Argument(
            help="sotu, shakespeare; text for files of your own; fineweb10B, fineweb100B, finewebedu10B for ready-made "
            "shards; hub:OWNER/NAME for a text dataset on the hub; shards for tokens that other programs made."
        ),
    ] = "sotu",
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="More of --input, so that a glob need not be quoted."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="File, folder or glob of .txt, .md, .jsonl, .csv, .tsv, .parquet, also .gz and .zst; - for stdin.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Of the inputs, where their names do not tell: plain, jsonl, csv, parquet."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The key or column that holds the text; text without it.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Cuts plain files into documents, such as '<|endoftext|>'.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="byte, char, gpt2, another encoding of tiktoken, or a tokenizer.json; the corpus has a default."
        ),
    ] = None,
    train_bpe: Annotated[
        int | None,
        typer.Option(help="Train a byte-level BPE of so many entries on the training split, and use it."),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="How many training shards of FineWeb; 9 without it.")
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(help="A glob over the files of a dataset on the hub, such as 'sample/10BT/*'."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A commit of the repository on the hub.")] = None,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep exact copies of documents; they go to one split.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out what cannot be read, and list it, instead of ending."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the shards.")] = None,
    data: DataDir = Path("data"),
    workers: Annotated[int, typer.Option(min=0, help="Threads that tokenize; 0: one for each core.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be read or fetched and how large it is, and stop."),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Instead: say what a folder of shards holds, ours or another program's, and whether it is sound; "
            "exit code 1 if it is not, 2 if nothing there is known."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a corpus into token shards that train reads. Interrupted, the same command goes on where it was."""
    if check is not None:
        if paths:
            raise UserError(
                f"--check looks at one folder, and {shown(paths[0])} is named beside it: leave it out"
            )
        from nanorun.data.check import check_and_show

        found = check_and_show(check, _console(as_json))
        _print_json(found, as_json)
        raise typer.Exit(found["exit_code"])
    from nanorun.data.show import prepare_and_show

    reading = {"format": format, "column": column, "separator": separator, "skip_bad": skip_bad}
    hub = {"include": include, "revision": revision, "shards": shards}
    summary = prepare_and_show(
        corpus,
        out=out,
        root=data,
        tokenizer=tokenizer,
        inputs=[*(inputs or []), *(paths or [])],
        workers=workers,
        keep_duplicates=keep_duplicates,
        train_bpe=train_bpe,
        dry_run=dry_run,
        console=_console(as_json),
        **reading,
        **hub,
    )
    _print_json(summary, as_json)


@app.command(
    epilog="Example: nanorun train --track sotu --optim adamw --seeds 3 --set optim.default.lr=0.003"
)
def train(
    context: typer.Context,
    track: Annotated[str | None, typer.Option(help=f"The competition: {TRACKS}.")] = None,
    optim: Annotated[
        str | None, typer.Option(help="A preset under the track, or path/to/file.py:Class.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The first seed.")] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=0, help="How many seeds, one after the other; 0: as many as the track's rule asks for."
        ),
    ] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            help="Train on several corpora by weight, such as sotu:0.7,shakespeare:0.3 or ./data/novels:1; validated "
            "on the track's corpus all the same. Does not count where the track fixes its corpus."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    compile: Annotated[Literal["auto", "on", "off"] | None, typer.Option(help="torch.compile.")] = None,
    checkpoint_activations: Annotated[
        Literal["none", "block", "selective", "auto"] | None,
        typer.Option(help="Trade time for memory; auto takes the cheapest that fits."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A run's folder: go on from its newest checkpoint, with the config and options it had; "
            "--data, --records, --device, --wandb, --record, --require-target, --skip-bad-steps and --allow-inexact "
            "may be given anew."
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            # torchrun refuses --run, even among the words of what it runs: it could be its own --run-path.
            "--run-name",
            "--run",
            help="Name of the run's folder under --runs. The same command again takes the run up where it was, and "
            "of a finished one says the result: for jobs that are requeued.",
        ),
    ] = None,
    skip_bad_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Leave out the updates of so many steps whose loss or gradient is not finite before the run fails; "
            "the record says how many.",
        ),
    ] = 0,
    allow_inexact: Annotated[
        bool,
        typer.Option(
            "--allow-inexact",
            help="Take a run up on another machine, torch or number of ranks: other bits, and the record says so.",
        ),
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    data: DataDir = Path("data"),
    records: RecordsDir = Path("records"),
    wandb: Annotated[Literal["off", "offline", "online"], typer.Option(help="Log to wandb as well.")] = "off",
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Write a record of the finished run.")
    ] = True,
    stop_at_target: Annotated[
        bool, typer.Option("--stop-at-target", help="End at the target; does not count.")
    ] = False,
    require_target: Annotated[
        bool, typer.Option("--require-target", help="Exit with 1 if the target is missed.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Deterministic algorithms alone; it says what they cost.")
    ] = False,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Import the optimizer from outside that a preset or a run's config names. It runs with your rights.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train to the target validation loss and write a record."""
    _forget_told_code()
    console = _console(as_json)
    places: dict[str, Any] = {
        "runs": runs,
        "data": data,
        "records": records,
        "device": device,
        "wandb": wandb,
    }
    behaviour: dict[str, Any] = {
        "record": record,
        "stop_at_target": stop_at_target,
        "require_target": require_target,
    }
    behaviour |= {
        "skip_bad_steps": skip_bad_steps,
        "allow_inexact": allow_inexact,
        "run": run or "",
        "deterministic": deterministic,
    }
    options = {**places, **behaviour}
    changes = _changes(settings, compile, checkpoint_activations, mix)
    try:
        with _listening_early():
            from nanorun.training.run import resume_run, train_seeds

            if resume is not None:
                anew = _given_anew(context, options)
                results = [resume_run(resume, console, anew, trust_code=trust_code)]
            else:
                results = train_seeds(
                    track, optim, changes, seed, seeds, options, console, trust_code=trust_code
                )
    except RunFailed as error:
        _print_json(error.result, as_json and error.result is not None)
        raise
    _print_json(results[0] if seeds == 1 else {"runs": results}, as_json)


@contextmanager
def _listening_early() -> Iterator[None]:
    """Stop in a sentence at a signal that comes before a run listens: it imports, prepares data or sets up.

    A signal that is ignored stays so: a job that sends it again means the one that comes later. Ranks are left to
    torchrun, which ends them by SIGTERM when another one has failed and told of it.
    """

    def stop(number: int, frame: object) -> None:
        raise StoppedEarly(signal.Signals(number).name)

    before = {}
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        # Ctrl-C is heard already. Not in the main thread: whoever started this handles the signals.
        with suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGUSR1):
                if signal.getsignal(number) == signal.SIG_DFL:
                    before[number] = signal.signal(number, stop)
    try:
        yield
    except StoppedEarly as early:
        raise Stopped(
            f"stopped by {early} before the first step: nothing is lost, and the same command starts the run"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


MAY_CHANGE_ON_RESUME = {
    "data",
    "records",
    "device",
    "wandb",
    "record",
    "require_target",
    "skip_bad_steps",
    "allow_inexact",
}


def _changes(
    settings: list[str] | None, compile: str | None, checkpoint_activations: str | None, mix: str | None
) -> list[str]:
    """Return the settings that train's options make, `--set` first."""
    from nanorun.config import mix_setting

    flags = {"train.compile": compile, "train.checkpoint_activations": checkpoint_activations}
    changes = [*(settings or []), *(f"{key}={value}" for key, value in flags.items() if value)]
    return [*changes, *([] if mix is None else [mix_setting(mix)])]


def _given_anew(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options written beside --resume; refuse those that the run cannot change any more."""
    given = {key for key in context.params if _is_given(context, key)} - {"resume", "as_json", "trust_code"}
    fixed = sorted(given - MAY_CHANGE_ON_RESUME)
    if fixed:
        flag = {"settings": "set"}.get(fixed[0], fixed[0].replace("_", "-"))
        raise UserError(
            f"--{flag} beside --resume: a run is taken up again with the config it had; leave --{flag} out, "
            "or start a new run"
        )
    return {key: options[key] for key in given}


def _is_given(context: typer.Context, key: str) -> bool:
    source = context.get_parameter_source(key)
    return source is not None and source.name == "COMMANDLINE"


@app.command(epilog="Example: nanorun report --track sotu --format markdown")
def report(
    track: Annotated[str | None, typer.Option(help="One track; all that have records without it.")] = None,
    format: Annotated[
        Literal["table", "markdown", "csv", "json", "svg", "html"],
        typer.Option(
            help="How to print it; svg: the loss curves of one track; html: one page with charts, no network."
        ),
    ] = "table",
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
    records: RecordsDir = Path("records"),
    since: Annotated[
        str | None, typer.Option(help="Only records from this day or time on (UTC, ISO 8601).")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="Only machines whose name contains this.")] = None,
    x: Annotated[
        Literal["seconds", "steps", "tokens"] | None,
        typer.Option("--x", help="What curves run against; by default what the track is scored in."),
    ] = None,
    curves: Curves = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Render README.md in the folder of records: every track's table.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="With --readme: write nothing, and exit with 1 if it is stale."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the records table: who reaches the target soonest, and how sure that is."""
    if readme or check:
        from nanorun.records.readme import render_readme

        chosen = track or since or hardware or x or curves is not None or format != "table" or as_json
        if not readme or chosen:
            raise UserError(
                "--readme renders every record; beside it go --check, --records and --out alone"
                if readme
                else "--check says whether the README is stale; add --readme"
            )
        typer.echo(render_readme(records, out=out, check=check), err=True)
        return
    from nanorun.records.show import report_text

    text = report_text(
        records,
        track=track,
        form="json" if as_json else format,
        since=since,
        hardware=hardware,
        console=_console(False),
        x=x,
        curves=curves if out is None else bool(curves),
    )
    _hand_over(text, out)


@app.command(
    epilog="Example: nanorun score times.csv --held-out fastmri_tanh=fastmri --format svg --out profiles.svg"
)
def score(
    times: Annotated[
        Path | None,
        typer.Argument(
            help="CSV with the columns submission, workload, seconds (empty: target not reached); - for stdin. A "
            "row is a study, or a trial of one where a column study says so; a column budget holds the workload's "
            "runtime in seconds."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            help="VARIANT=BASE, repeatable: who misses the variant loses the base workload.",
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of a file: score our own records of this track, repeatable. Presets are the submissions, "
            "tracks the workloads, and a seed's first crossing is a study."
        ),
    ] = None,
    ruleset: Annotated[
        Literal["external", "self"],
        typer.Option(
            help="How the times were tuned. AlgoPerf itself asks 5 studies of 5 trials on each workload, of which the "
            "fastest counts (external); self-tuning takes one trial a study and three times the runtime budget. "
            "Here the studies are those in the file; of trials of one study, external takes the fastest and self "
            "refuses the second; a time above budget, or above three times it for self, is a miss."
        ),
    ] = "external",
    format: Annotated[
        Literal["table", "markdown", "csv", "json", "svg"], typer.Option(help="How to print it.")
    ] = "table",
    plot: Annotated[
        Literal["profiles", "tau-max"],
        typer.Option(help="The curves: performance profiles, or the score against where they end."),
    ] = "profiles",
    curves: Curves = None,
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
    records: RecordsDir = Path("records"),
    hardware: Annotated[
        str | None, typer.Option(help="With --track: only machines whose name contains this.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score training algorithms over several workloads, as the AlgoPerf benchmark does."""
    from nanorun.records.show_score import score_text

    text = score_text(
        times,
        tracks=track or [],
        held_out=held_out or [],
        ruleset=ruleset,
        form="json" if as_json else format,
        plot=plot,
        records=records,
        hardware=hardware,
        curves=curves if out is None else bool(curves),
        console=_console(False),
    )
    _hand_over(text, out)


@app.command(
    epilog="Example: nanorun reproduce 2026-11-25-muon-0708d573. Exit codes: 0 agrees, 1 disagrees or failed, "
    "2 refused, 75 stopped."
)
def reproduce(
    record: Annotated[str, typer.Argument(help="A record's folder, or its id.")],
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Run the patch or the optimizer from outside that the record holds, in a checkout of its commit. "
            "It is shown first. It runs with your rights.",
        ),
    ] = False,
    at_commit: Annotated[
        bool, typer.Option("--at-commit", help="Run the record's commit, not the code that is here.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the record's.")] = None,
    by: Annotated[str | None, typer.Option(help="Your name; git's user.name without it.")] = None,
    data: DataDir = Path("data"),
    records: RecordsDir = Path("records"),
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto (the record's kind), cpu, cuda or cuda:N.")] = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a reproduction that was stopped: its folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what differs, and run nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a record again on this machine, and write beside it whether it agrees.

    The loss has to be the same to the bit, or within a tolerance that is said; the seconds are judged on like
    hardware, software and code, on a quiet machine. A record is claimed until somebody reproduces or contests it.
    """
    from nanorun.training.reproduce import Request
    from nanorun.training.reproduce import reproduce as run_again

    request = Request(record, records, data, runs, device, seed, by, trust_code, at_commit, dry_run, resume)
    try:
        result = run_again(request, _console(as_json))
    except RunFailed as error:
        _print_json(error.result, as_json and error.result is not None)
        raise
    _print_json(result, as_json)


@app.command(epilog='Example: nanorun contest 2026-11-25-muon-0708d573 --reason "validated on training text"')
def contest(
    record: Annotated[str, typer.Argument(help="A record's folder, or its id.")],
    reason: Annotated[str, typer.Option(help="What is wrong with it, so that others can check.")],
    by: Annotated[str | None, typer.Option(help="Your name; git's user.name without it.")] = None,
    records: RecordsDir = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Write an objection beside a record, which is contested then; removing the file withdraws it."""
    from nanorun.errors import printable
    from nanorun.records.states import contest as object_to

    result = object_to(record, records=records, reason=reason, by=by)
    _print_json(result, as_json)
    if not as_json:
        text = printable(f"{result['says']}\nwritten: {result['file']}")
        # The objection stands already, so a letter that the output lacks must not fail the command.
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))


@app.command("import", epilog="Example: nanorun import logs/ --track fineweb-small --dry-run")
def import_(
    paths: Annotated[list[Path], typer.Argument(help="Training logs, or folders of logs.")],
    track: Annotated[
        str | None, typer.Option(help="The competition that the runs belong to; --dry-run needs none.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and show, write nothing.")] = False,
    claimed_seconds: Annotated[
        float | None, typer.Option(help="What the submission claims, kept beside the log's own time.")
    ] = None,
    records: RecordsDir = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Read the logs of modded-nanogpt, llm.c and nanoGPT, and keep what they say as imports."""
    from nanorun.records.importing import import_logs, print_terminal

    result = import_logs(
        paths, track=track, records=records, dry_run=dry_run, claimed_seconds=claimed_seconds
    )
    _print_json(result.to_dict(), as_json)
    if not as_json:
        print_terminal(result, _console(False))


Loss = Annotated[str, typer.Option("--loss", help="Which validation loss, such as val_ema_loss.")]
Step = Annotated[
    int | None, typer.Option(min=0, help="The claimed step; without it the declared last one of full runs.")
]
Pool = Annotated[
    bool,
    typer.Option("--pool", help="Average runs of different configs, code or machines, and say what differs."),
]


@app.command(epilog="Example: nanorun verify logs/ --target 3.28 --margin 0.004 --step 3250")
def verify(
    paths: Annotated[
        list[str],
        typer.Argument(help="Records, runs' folders, training logs, folders of these, or track:optimizer."),
    ],
    target: Annotated[float | None, typer.Option(help="Validation loss to be under; the track's.")] = None,
    rule: Annotated[
        Literal["t", "z", "margin"] | None,
        typer.Option(
            help="t-test, z-test with --sigma, or (target - mean)·√n ≥ --margin; the track's, or t."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Level of t and z; the track's, or 0.01.")] = None,
    margin: Annotated[float | None, typer.Option(help="In nats; alone it means --rule margin.")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Spread over seeds in nats; alone it means --rule z.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Seeds asked for; the track's, or 1 beside a rule.")
    ] = None,
    step: Step = None,
    loss: Loss = "val_loss",
    track: Annotated[str | None, typer.Option(help="Where target and rule come from.")] = None,
    pool: Pool = False,
    require: Annotated[
        bool, typer.Option("--require", help="Exit with 1 unless every group passes.")
    ] = False,
    records: RecordsDir = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Check whether runs prove a claim: each group's mean loss against a target, by a stated rule."""
    from nanorun.records.verify import RuleOptions, print_verification, require_all, verify

    options = RuleOptions(rule=rule, alpha=alpha, margin=margin, sigma=sigma, n=n)
    result = verify(
        paths, options, target=target, track=track, step=step, loss=loss, pool=pool, records=records
    )
    _print_json(result.to_dict(), as_json)
    if not as_json:
        print_verification(result, _console(False))
    if require:
        require_all(result)


@app.command(epilog="Example: nanorun compare sotu:muon sotu:adamw")
def compare(
    a: Annotated[str, typer.Argument(help="Record, run's folder, log, folder of these, or track:optimizer.")],
    b: Annotated[str, typer.Argument(help="The same.")],
    loss: Loss = "val_loss",
    step: Step = None,
    target: Annotated[
        float | None, typer.Option(help="For seconds and steps to it; the records' own.")
    ] = None,
    pool: Pool = False,
    force: Annotated[
        bool, typer.Option("--force", help="Across different corpora, validation tokens or machines too.")
    ] = False,
    records: RecordsDir = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Compare two sets of runs: loss, seconds, steps, and what differs between them."""
    from nanorun.records.compare import compare, print_comparison

    result = compare(a, b, loss=loss, step=step, target=target, pool=pool, force=force, records=records)
    _print_json(result.to_dict(), as_json)
    if not as_json:
        print_comparison(result, _console(False))


@app.command(epilog="Example: nanorun power --sigma 0.0013 --delta 0.002")
def power(
    sigma: Annotated[float, typer.Option(help="Spread of the final loss over seeds, in nats.")],
    delta: Annotated[float | None, typer.Option(help="The difference to see, in nats.")] = None,
    alpha: Annotated[float, typer.Option(help="Level of the test.")] = 0.01,
    power: Annotated[float, typer.Option(help="How often the difference shall be seen.")] = 0.8,
    n: Annotated[int | None, typer.Option(help="Seeds there are: what they can tell.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many seeds a difference takes to be seen, or what a number of seeds can see."""
    from nanorun.records.power import lines, plan

    document = plan(sigma=sigma, delta=delta, alpha=alpha, power=power, n=n)
    _print_json(document, as_json)
    if not as_json:
        typer.echo("\n".join(lines(document)))


@app.command(epilog='Example: nanorun sample runs/20260101-120000-sotu-muon-s0 --prompt "My fellow citizens"')
def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest; 0 keeps all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same text.")] = 0,
) -> None:
    """Let a trained model write."""
    from nanorun.errors import printable
    from nanorun.sample import sample as write

    text = write(run, prompt=prompt, n_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    # A model may write any byte; those that steer a terminal reach none.
    typer.echo(printable(text) if sys.stdout.isatty() else text)


@app.command(epilog="Example: nanorun memory --track shakespeare --set train.micro_batch_rows=16 --measure")
def memory(
    track: Annotated[str | None, typer.Option(help=f"The competition: {TRACKS}.")] = None,
    optim: Annotated[
        str | None, typer.Option(help="A preset under the track, or path/to/file.py:Class.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    data: DataDir = Path("data"),
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Run two steps on made-up tokens, and set what they took beside it."),
    ] = False,
    lecture: Annotated[
        bool,
        typer.Option(
            "--lecture",
            help="Instead: a GPT-2 of 1.5 billion parameters, by the lecture's formulas and as nanorun trains it.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run will hold in memory, before anything runs: states, activations, buffers."""
    from nanorun.training.memory_show import account_of, lecture_account, show

    given = track or optim or settings or measure
    if lecture and given:
        raise UserError("--lecture is an account of its own shape; beside it goes --json alone")
    account = (
        lecture_account() if lecture else account_of(track, optim, settings or [], device, data, measure)
    )
    _print_json(account, as_json)
    if not as_json:
        show(account, _console(False))


@app.command(epilog="Example: nanorun optimizers muon")
def optimizers(
    name: Annotated[str | None, typer.Argument(help="One optimizer; all of them without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the optimizers: options, state, paper, and whose code each is."""
    from nanorun.optimizers import all_names, describe, show_all, show_one

    if as_json:
        pages = [describe(one) for one in ([name] if name else all_names())]
        _print_json(pages[0] if name else {"optimizers": pages}, True)
    elif name is None:
        show_all(_console(False))
    else:
        show_one(name, _console(False))


@app.command(epilog="Example: nanorun launch --slurm --time 4:00:00 --out job.sh -- --track sotu")
def launch(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(help="After --: the words of nanorun train.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="A batch script for sbatch.")] = False,
    sky: Annotated[bool, typer.Option("--sky", help="A task file for sky jobs launch.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; 0 trains on CPUs.")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each; one for each GPU without it.")
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Cores for each process.")] = 4,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often torchrun starts the processes again after one of them died.")
    ] = 0,
    before: Annotated[
        list[str] | None,
        typer.Option(help="A line of shell that runs first, such as 'module load cuda'; repeatable."),
    ] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: the job's time limit, such as 4:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm.")] = None,
    warn_seconds: Annotated[
        int,
        typer.Option(min=1, help="Slurm: how long before the limit the run stops with a checkpoint."),
    ] = 120,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Slurm: another directive, such as mem=64G or qos=high; repeatable."),
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="Sky: the kind of GPU, such as H100.")] = None,
    bucket: Annotated[
        str | None, typer.Option(help="Sky: where runs and records are kept, such as s3://mine/nanorun.")
    ] = None,
    infra: Annotated[str | None, typer.Option(help="Sky: CLOUD/REGION/ZONE; any without it.")] = None,
    spot: Annotated[
        bool, typer.Option("--spot/--on-demand", help="Sky: machines that can be taken away, or dear ones.")
    ] = True,
    install: Annotated[
        str | None, typer.Option(help="Sky: what pip installs; the folder it is launched from without it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
) -> None:
    """Print the batch script or task file of a run, which is queued again until it is finished."""
    from nanorun import launch as jobs

    _one_kind_of_job(context, slurm, sky)
    training = _training_of(words or [], sky=sky)
    shape = jobs.Shape(nodes, gpus_per_node, ranks_per_node or max(gpus_per_node, 1), cpus, max_restarts)
    first = tuple(before or ())
    if sky:
        text = jobs.sky_task(
            training, shape, jobs.Sky(bucket or "", accelerator, infra, spot, install, first)
        )
    else:
        asked = jobs.Slurm(time, partition, account, warn_seconds, tuple(sbatch or ()), first)
        text = jobs.slurm_script(training, shape, asked, folder=Path.cwd(), python=sys.executable)
    _hand_over(text, out)


SLURM_OPTIONS = {"time", "partition", "account", "warn_seconds", "sbatch"}
SKY_OPTIONS = {"accelerator", "bucket", "infra", "spot", "install"}


def _one_kind_of_job(context: typer.Context, slurm: bool, sky: bool) -> None:
    """Raise UserError unless one cluster is named, with no option of the other."""
    if slurm == sky:
        raise UserError("give one of --slurm, for a batch script, and --sky, for a task file")
    for key in sorted(SKY_OPTIONS if slurm else SLURM_OPTIONS):
        if _is_given(context, key):
            flag = {"spot": "spot/--on-demand"}.get(key, key.replace("_", "-"))
            raise UserError(f"--{flag} beside --{'slurm' if slurm else 'sky'}: leave it out")


def _training_of(words: list[str], *, sky: bool) -> Training:
    """Return what a job trains; its words are parsed by the train command itself."""
    from nanorun.launch import training_of

    group: Any = typer.main.get_command(app)
    given = group.commands["train"].make_context("nanorun train", list(words)).params
    changes = _changes(*(given[key] for key in ("settings", "compile", "checkpoint_activations", "mix")))
    return training_of(words, given, changes, sky=sky)


@app.command(epilog="Example: nanorun doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do and what is missing, with the mend."""
    from nanorun.doctor import examine

    findings = examine(Path("."))
    if as_json:
        _print_json({"findings": [one._asdict() for one in findings]}, True)
        return
    for one in findings:
        typer.echo(f"{'ok  ' if one.ok else 'MEND'}  {one.topic:<16} {one.found}")
        if one.mend:
            typer.echo(f"{'':22} -> {one.mend}")


def main() -> None:
    """Run the command line; errors of the user's end in one sentence and exit code 2."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            _end("stopped by Ctrl-C; there is nothing to resume from", INTERRUPTED)
        raise
    except UserError as error:
        _end(f"error: {error}", error.exit_code)
    except RunFailed as error:
        _end(f"failed: {error}", 1, tell=not isinstance(error, RankLost))
    except Stopped as stopped:
        # All ranks of a run stop together, and one of them says how to go on.
        _end(str(stopped) if os.environ.get("RANK", "0") == "0" else "", 75)
    except UnicodeEncodeError as error:
        _end(f"error: {_not_encoded(error)}", 2)
    except OSError as error:
        _end(f"error: {error.filename or 'a file'}: {error.strerror or error}", 2)


def _not_encoded(error: UnicodeEncodeError) -> str:
    letter = f"U+{ord(error.object[error.start]):04X}"
    if error.encoding.lower().replace("_", "-") == "utf-8":
        return f"a name or text holds {letter}, a byte that is not UTF-8: give it in UTF-8"
    return (
        f"the output takes {error.encoding} alone, and {letter} is not in it: set PYTHONIOENCODING=utf-8, or name a "
        "file with --out FILE where the command has it"
    )


def _end(text: str, code: int, *, tell: bool = True) -> None:
    from nanorun.errors import printable

    if text:
        print(f"nanorun: {printable(text)}", file=sys.stderr)
    if tell:
        _tell_code(code)
    sys.exit(code)


def _tell_code(code: int) -> None:
    """Write the exit code into the file that a job named: torchrun ends with 1 whatever its ranks end with."""
    with suppress(OSError), open(os.environ.get("NANORUN_EXIT_CODE", ""), "r+") as told:
        told.truncate()  # another rank may have written one before
        told.write(str(code))
        told.truncate()  # another rank may have written a longer one


def _forget_told_code() -> None:
    """Empty the file that a job named: what another program told, or ranks that torchrun started before, is over."""
    # One rank does so, as it starts: no other can have failed by then, importing takes it longer.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError), open(os.environ.get("NANORUN_EXIT_CODE", ""), "r+") as told:
            told.truncate()


def _hand_over(text: str, out: Path | None) -> None:
    """Print `text`, or write it to a file where one was named."""
    if out is None:
        typer.echo(text, nl=False)
    else:
        from nanorun.files import write_whole

        write_whole(out, text, mend="choose another --out")


def _console(as_json: bool) -> Console:
    from rich.console import Console

    class Steadfast(Console):
        def on_broken_pipe(self) -> None:
            # Ctrl-C ends the `tee` behind a run first; rich would end the run as well, before its checkpoint.
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    return Steadfast(stderr=as_json)


def _print_json(document: Any, as_json: bool) -> None:
    # Under torchrun every rank has the document, and the first one prints it.
    if as_json and os.environ.get("RANK", "0") == "0":
        typer.echo(json.dumps(document, indent=1, allow_nan=False))
