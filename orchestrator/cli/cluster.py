"""The commands about clusters: `orchestrator cluster …` and `orchestrator submit …`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.terminal import Debug, Overrides, console, explained

cluster_app = typer.Typer(
    no_args_is_help=True, help="Bring a cluster up on this machine, or write files for one elsewhere."
)

Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where its state, data and logs are; default: in ~/.local/state.")
]


Where = Annotated[str, typer.Argument(help="local: on this machine, the only place that is managed from here.")]


def _see_that_local(where: str) -> None:
    from workloads.errors import ConfigError

    if where != "local":
        raise ConfigError(f"{where}: only `local` is managed from here; `cluster render` writes files for others")


@cluster_app.command("up")
def cluster_up(
    where: Where = "local",
    nodes: Annotated[int, typer.Option(help="Raylets that take work, beside the head.")] = 2,
    cpus_per_node: Annotated[int, typer.Option(help="Logical CPUs of each; 0: the machine's cores.")] = 0,
    store: Annotated[str, typer.Option(help="swift: an S3 store too; none: plain folders do.")] = "none",
    gcs_port: Annotated[int, typer.Option(help="Ray's head.")] = 6379,
    dashboard_port: Annotated[
        int, typer.Option(help="Ray's dashboard and job API; the port after it is taken too.")
    ] = 8265,
    client_port: Annotated[int, typer.Option(help="Ray's client server.")] = 10001,
    mlflow_port: Annotated[int, typer.Option(help="MLflow's server.")] = 5000,
    s3_port: Annotated[int, typer.Option(help="The S3 store, which also takes the three ports after it.")] = 9000,
    folder: Folder = None,
    debug: Debug = False,
) -> None:
    """Start a Ray cluster of several nodes, an MLflow server and, if wanted, an S3 store here; everything on loopback."""
    with explained(debug):
        from cluster.local import ClusterError, LocalOptions, default_folder, up
        from orchestrator.ray_support.spare_processes import importing

        _see_that_local(where)
        if store not in ("none", "swift"):
            raise ClusterError(f"--store {store}: give none or swift")
        options = LocalOptions(
            nodes=nodes,
            cpus_per_node=cpus_per_node,
            store=store,
            gcs_port=gcs_port,
            dashboard_port=dashboard_port,
            client_port=client_port,
            mlflow_port=mlflow_port,
            s3_port=s3_port,
        )
        node_environment = {**importing(), "RAY_worker_niceness": "0"}
        shown = console()
        with shown.status("starting") as status:
            made = up(
                folder or default_folder(),
                options,
                node_environment=node_environment,
                say=lambda text: status.update(f"waiting for {text}"),
            )
        _show(made)


@cluster_app.command("status")
def cluster_status(where: Where = "local", folder: Folder = None, debug: Debug = False) -> None:
    """What of the local cluster runs, where it is reached, and what it has; exit code 1 if something of it does not run."""
    with explained(debug):
        from cluster.local import ClusterError, default_folder, find, processes

        _see_that_local(where)
        place = folder or default_folder()
        found = find(place)
        if found is None:
            raise ClusterError(f"no cluster is up in {place}")
        if not processes(found):
            raise ClusterError(f"the cluster in {place} was lost with its machine or killed; `cluster up` starts anew")
        if not _show(found):
            raise typer.Exit(1)


def _show(found: Any) -> bool:
    """Print what runs; returns whether that is everything."""
    from rich.table import Table

    from cluster.local import resources, states

    table = Table("service", "state", "")
    running = states(found)
    if not running:
        typer.echo(
            f"the supervisor of the cluster in {found.folder} is gone; `cluster down` ends what it left", err=True
        )
        return False
    for name, (state, told) in running.items():
        table.add_row(name, state.lower(), told)
    shown = console()
    shown.print(table)
    try:
        has = ", ".join(
            f"{name} {amount:g}" for name, amount in sorted(resources(found).items()) if name in ("CPU", "GPU")
        )
    except (OSError, ValueError, KeyError) as error:
        has = f"does not answer ({type(error).__name__})"
    rows = {
        "jobs": found.dashboard,
        "mlflow": found.tracking_uri,
        "s3": found.s3_endpoint or "none",
        "resources": has,
        "logs": f"{found.folder}/logs",
        "use it": f"source {found.environment_file}",
    }
    for what, value in rows.items():
        shown.print(f"{what:<10} {value}", highlight=False, soft_wrap=True)
    return bool(running) and all(state == "RUNNING" for state, _ in running.values()) and "answer" not in has


@cluster_app.command("down")
def cluster_down(where: Where = "local", folder: Folder = None, debug: Debug = False) -> None:
    """Stop exactly what `up` started, also after a crash; data and logs stay."""
    with explained(debug):
        from cluster.local import default_folder, down

        _see_that_local(where)
        place = folder or default_folder()
        with console().status("stopping"):
            count = down(place)
        typer.echo(f"stopped {count} processes; data and logs stay in {place}")


@cluster_app.command("render")
def cluster_render(
    target: Annotated[
        str, typer.Argument(help="kuberay: a RayJob and MLflow for Kubernetes; aws: a file for `ray up`.")
    ],
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or path of its YAML file.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("cluster-files"),
    sweep: Annotated[bool, typer.Option("--sweep", help="For the file's sweep instead of the one run.")] = False,
    image: Annotated[
        str, typer.Option(help="Container image, built from cluster/Containerfile.")
    ] = "orchestrator:0.1.0",
    memory_gib: Annotated[int | None, typer.Option(help="Of each worker; default: a rule of thumb.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take the memory from a few steps of one worker's share, made here.")
    ] = False,
    spot: Annotated[bool, typer.Option(help="Workers may be taken away at any time, and cost less.")] = True,
    retries: Annotated[int, typer.Option(min=0, help="Kubernetes: how often the job is made again.")] = 3,
    region: Annotated[str | None, typer.Option(help="AWS: where.")] = None,
    instance_profile: Annotated[str | None, typer.Option(help="AWS: whose role may use the buckets.")] = None,
    worker_type: Annotated[str, typer.Option(help="AWS: instance type with room for one worker.")] = "g5.2xlarge",
    debug: Debug = False,
) -> None:
    """Write the files that bring up the machines which an experiment asks for; nothing is started, no secret is written."""
    with explained(debug):
        from orchestrator.experiments.load import load_experiment, load_sweep
        from workloads.errors import ConfigError

        if target not in ("kuberay", "aws"):
            raise ConfigError(f"{target}: give kuberay or aws")
        given = overrides or []
        loaded = load_sweep(experiment, given) if sweep else load_experiment(experiment, given)
        from cluster import aws, kuberay
        from orchestrator.launch.machines import request_of, write_files

        asked = request_of(loaded, image=image, memory_gib=memory_gib, measure=measure, spot=spot, retries=retries)
        if target == "kuberay":
            files = {"rayjob.yaml": kuberay.render_job(asked)}
            if asked.tracking_uri is None:
                files["mlflow.yaml"] = kuberay.render_mlflow(asked)
        else:
            if region is None or instance_profile is None:
                raise ConfigError("--region and --instance-profile: needed for aws; the role takes the place of keys")
            if asked.tracking_uri is None:
                raise ConfigError(
                    "tracking.uri: give an MLflow server that the machines reach, or set MLFLOW_TRACKING_URI"
                )
            made = aws.render(asked, region=region, instance_profile=instance_profile, worker_type=worker_type)
            files = {"aws.yaml": made}
        for path in write_files(output, files):
            typer.echo(path)
