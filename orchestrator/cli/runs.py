"""The commands on runs: train, finetune, plan, sweep, promote, evaluate, one-shot, export, discover, status and demo."""

import time
from collections.abc import Mapping
from typing import Annotated

import typer

from orchestrator.cli.root import app
from orchestrator.cli.terminal import (
    Debug,
    Experiment,
    Overrides,
    Run,
    TrackingUri,
    console,
    counting,
    explained,
)


@app.command()
def train(
    experiment: Experiment,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Pretrain a backbone: `orchestrator train anchor_ntxent_caltech data.uri=shards scaling.num_workers=2`."""
    _run_loop("pretrain", experiment, overrides, debug)


@app.command()
def finetune(
    experiment: Experiment,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Train a detector on a pretrained trunk: `orchestrator finetune finetune_retinanet_coco trunk.kind=checkpoint trunk.uri=…`."""
    _run_loop("finetune", experiment, overrides, debug)


def _run_loop(loop: str, experiment: str, overrides: list[str] | None, debug: bool) -> None:
    began = process_start()
    with explained(debug):
        from orchestrator.experiments.load import load_experiment

        loading = time.time()
        loaded = load_experiment(experiment, overrides or [], loop=loop)
        from orchestrator.training.run import train as run_training
        from orchestrator.training.session import Stopwatch

        watch = Stopwatch(began)
        watch.timings |= {"startup/interpreter_s": loading - began, "startup/imports_s": time.time() - loading}
        outcome = run_training(loaded, console=console(), watch=watch, debug=debug)
        typer.echo(last_line(outcome.run_id, outcome.address, outcome.metrics))


@app.command()
def plan(
    experiment: Experiment,
    overrides: Overrides = None,
    calibrate: Annotated[bool, typer.Option(help="Measure time and memory in a few steps on this machine.")] = True,
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Lowest and highest price of one worker for an hour."),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the figures to this file, as JSON.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Plan the file's sweep instead of the one run.")] = False,
    debug: Debug = False,
) -> None:
    """Estimate a run's data, memory, time and price before it starts: `orchestrator plan NAME --price 0.4 1.2`.

    The measured steps are one worker's share of a batch, in a separate process; nothing else is started.
    """
    with explained(debug):
        from pathlib import Path

        from orchestrator.experiments.load import load_experiment, load_sweep
        from orchestrator.launch.plan import Plan, SweepPlan, plan_run, plan_sweep

        result: Plan | SweepPlan
        with console().status("measuring a few steps" if calibrate else "counting"):
            if sweep:
                result = plan_sweep(load_sweep(experiment, overrides or []), calibrate=calibrate, price=price)
            else:
                result = plan_run(load_experiment(experiment, overrides or []), calibrate=calibrate, price=price)
        for label, value in result.lines():
            typer.echo(f"{label:<15} {value}")
        if json_file is not None:
            Path(json_file).write_text(result.to_json() + "\n", encoding="utf-8")


@app.command()
def sweep(
    experiment: Annotated[
        str, typer.Argument(help="Name of an experiment with a sweep section, or path of its YAML file.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep if it was begun before, else begin it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Search a space of dotted keys, rank the trials by a frozen evaluation, compare the winner with the baseline configuration.

    `orchestrator sweep NAME sweep.trials=20 sweep.space.objective.temperature='{kind: loguniform, low: 0.03, high: 0.3}'`
    """
    with explained(debug):
        from orchestrator.experiments.load import load_sweep

        loaded = load_sweep(experiment, overrides or [])
        from orchestrator.sweeps.run import show_sweep
        from orchestrator.sweeps.run import sweep as run_sweep

        screen = console()
        show_sweep(run_sweep(loaded, console=screen, resume=resume, debug=debug), console=screen)


@app.command()
def promote(
    target: Annotated[str | None, typer.Argument(help="Run or sweep: MLflow run id, or name.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="Condition that the model must meet, as 'eval/sga >= 0.45'; may be given again."),
    ] = None,
    alias: Annotated[str, typer.Option(help="Alias of the registered model.")] = "champion",
    model: Annotated[str | None, typer.Option(help="Name in the registry; default: the experiment's.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Promote even if a gate fails or the model is no better.")
    ] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Move the alias back to the version before.")] = False,
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Register a run's best model, or a sweep's winner, and move an alias to it, if it is better.

    It must pass every gate. It must also beat the model that has the alias now: the interval of the paired difference on the
    same crops must lie above zero.
    """
    with explained(debug):
        from workloads.errors import RequestError

        if rollback and model is None:
            raise RequestError("--rollback: give --model NAME, the registered model whose alias moves back")
        if not rollback and target is None:
            raise RequestError("give a run or a sweep to promote, or --rollback --model NAME")
        from orchestrator.results.promote import parse_gate, roll_back
        from orchestrator.results.promote import promote as promote_run

        if rollback and model is not None:
            gone, back = roll_back(model, alias=alias, tracking_uri=tracking_uri)
            typer.echo(f"models:/{model}@{alias} is version {back} again, after version {gone}")
            return
        assert target is not None
        gates = [parse_gate(text) for text in gate or []]
        done = promote_run(target, gates=gates, alias=alias, model=model, force=force, tracking_uri=tracking_uri)
        for line in done.lines():
            typer.echo(line)


def process_start() -> float:
    """Start time of this process, seconds since the epoch: the moment of the command."""
    import psutil

    return psutil.Process().create_time()


def last_line(run_id: str, address: str, metrics: Mapping[str, float]) -> str:
    """The last line of a run's output: run id, where to look at it, headline metric."""
    if "eval/sga" in metrics:
        headline = f"eval/sga {metrics['eval/sga']:.3f} (centre rule; strict {metrics.get('eval/sga_strict', float('nan')):.3f})"
        if "eval/gap_r" in metrics:
            headline += f", eval/gap_r {metrics['eval/gap_r']:.1f}"
    elif "eval/knn" in metrics:
        headline = f"eval/knn {metrics['eval/knn']:.3f}"
        if "eval/linear" in metrics:
            headline += f", eval/linear {metrics['eval/linear']:.3f}"
    elif "eval/ap50" in metrics:
        headline = f"eval/ap50 {metrics['eval/ap50']:.3f}, eval/ap {metrics.get('eval/ap', float('nan')):.3f}"
    else:
        headline = f"train/loss {metrics.get('train/loss', float('nan')):.3f}"
    return f"run {run_id}  {address}  {headline}"


@app.command()
def evaluate(
    run: Run,
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option("--data", help="Dataset to evaluate on; default: the run's.")] = None,
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Measure SGA, RIGA and GAP-R of a run's model, and log them to the run."""
    with explained(debug):
        from orchestrator.results.evaluate import evaluate_run

        result = evaluate_run(run, overrides or [], data=data, tracking_uri=tracking_uri)
        for key, value in sorted(result.metrics.items()):
            typer.echo(f"{key}  {value:.4f}")
        typer.echo(last_line(result.run_id, result.address, result.headline))


@app.command("one-shot")
def one_shot(
    run: Annotated[str, typer.Argument(help="MLflow run id, or run name, of a pretraining run.")],
    data: Annotated[str, typer.Option("--data", help="Dataset with annotated objects.")],
    overrides: Overrides = None,
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Find an object in other images by a run's embeddings; log AP50, pointing accuracy and a gallery to the run."""
    with explained(debug):
        from orchestrator.results.evaluate import one_shot_of_run

        result = one_shot_of_run(run, overrides or [], data=data, tracking_uri=tracking_uri)
        for key, value in sorted(result.metrics.items()):
            typer.echo(f"{key}  {value:.4f}")
        typer.echo(f"run {result.run_id}  {result.address}  gallery in {result.artifacts}")


@app.command()
def export(
    target: Annotated[
        str, typer.Argument(help="MLflow run id, run name, or models:/NAME/VERSION, models:/NAME@ALIAS.")
    ],
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="torchvision, timm, safetensors, onnx or torch_export; may be given again; default: all of them."
        ),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder for the files and the model card.")] = "exported",
    licence: Annotated[str | None, typer.Option(help="Licence to state in the model card.")] = None,
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Export a run's trunk in formats that need nothing of this project: `orchestrator export RUN --format timm`."""
    with explained(debug):
        from pathlib import Path

        from orchestrator.results.export import export_run

        files = export_run(target, format or [], output=Path(output), licence=licence, tracking_uri=tracking_uri)
        for purpose, file in files.items():
            typer.echo(f"{purpose:<20} {file}")


@app.command()
def discover(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[FILE] KEY=VALUE…", help="Optional YAML file, then dotted keys: uri=DATASET …"),
    ],
    debug: Debug = False,
) -> None:
    """Find one object in each image without labels, and measure CorLoc where objects are annotated.

    `orchestrator discover uri=shards/val trunk.kind=checkpoint trunk.uri=RUN/checkpoints/step_… methods='\\[lost, tokencut, centre]'`
    """
    with explained(debug):
        from orchestrator.discovery.run import discover as run_discovery
        from orchestrator.discovery.run import table
        from orchestrator.discovery.spec import load_discovery

        experiment = load_discovery(arguments)
        with counting("images") as progress:
            outcome = run_discovery(experiment, progress=progress, debug=debug)
        for line in table(outcome.figures, experiment.methods):
            typer.echo(line)
        typer.echo(f"boxes {outcome.output}/{experiment.methods[0]}/boxes.parquet")
        headline = (
            f"eval/corloc {outcome.figures['eval/corloc']:.3f}" if "eval/corloc" in outcome.figures else "no figures"
        )
        typer.echo(f"run {outcome.run_id}  {outcome.address}  {headline}")


@app.command()
def status(
    run: Run,
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Show a run's step, speed, time left, score and faults, wherever it runs."""
    with explained(debug):
        from orchestrator.tracking.status import run_status

        for label, value in run_status(run, tracking_uri=tracking_uri).items():
            typer.echo(f"{label:<10} {value}")


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for the scenes, shards and runs.")] = "demo-output",
    overrides: Overrides = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Run a sweep of short trials instead of one run.")] = False,
    debug: Debug = False,
) -> None:
    """Draw synthetic scenes, shard them, pretrain for a few minutes on this machine, and evaluate."""
    began = process_start()
    with explained(debug):
        from orchestrator.demo.run import run_demo, run_sweep_demo

        if sweep:
            run_sweep_demo(output, overrides or [], console=console(), debug=debug)
            return
        run_demo(output, overrides or [], began=began, console=console(), debug=debug)
