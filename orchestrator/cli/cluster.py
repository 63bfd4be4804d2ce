"""The `cluster` commands: `up`, `status` and `down` for a local cluster, `render` for files that start one elsewhere."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import takes_options
from orchestrator.cli.suggestions import SuggestingGroup
from orchestrator.cli.terminal import Debug, Experiment, Overrides, console, explained

if TYPE_CHECKING:
    from cluster.local import LocalCluster

cluster_app = typer.Typer(
    cls=SuggestingGroup,
    no_args_is_help=True,
    help="Start a cluster on this machine, or write the files that start one elsewhere.",
)

Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="Folder of the cluster's state, data and logs; default: in ~/.local/state."),
]
Where = Annotated[str, typer.Argument(help="local: this machine, the only one that is managed from here.")]


def _check_local(where: str) -> None:
    from workloads.errors import RequestError

    if where != "local":
        raise RequestError(f"{where}: only `local` is managed from here; `cluster render` writes files for others")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """Options of `cluster up`."""

    nodes: Annotated[int, typer.Option(help="Raylets that run tasks, beside the head.")] = 2
    cpus_per_node: Annotated[int, typer.Option(help="Logical CPUs of each raylet; 0: the machine's cores.")] = 0
    store: Annotated[str, typer.Option(help="swift: start an S3 store too; none: use local folders.")] = "none"
    gcs_port: Annotated[int, typer.Option(help="Port of Ray's head.")] = 6379
    dashboard_port: Annotated[
        int, typer.Option(help="Port of Ray's dashboard and job API; the port after it is taken too.")
    ] = 8265
    client_port: Annotated[int, typer.Option(help="Port of Ray's client server.")] = 10001
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000
    s3_port: Annotated[int, typer.Option(help="Port of the S3 store; the three ports after it are taken too.")] = 9000


@cluster_app.command("up")
@takes_options(UpOptions)
def cluster_up(*, where: Where = "local", folder: Folder = None, debug: Debug = False, options: UpOptions) -> None:
    """Start a Ray cluster of several nodes, an MLflow server and, if wanted, an S3 store; all on loopback."""
    with explained(debug):
        from cluster.local import LocalOptions, default_folder, up

        _check_local(where)
        from orchestrator.ray_support.spare_processes import importing
        from orchestrator.training import PRELOAD

        with console().status("starting") as status:
            cluster = up(
                folder or default_folder(),
                LocalOptions(**asdict(options)),
                node_environment={**importing(PRELOAD), "RAY_worker_niceness": "0"},
                say=lambda text: status.update(f"waiting for {text}"),
            )
        _show(cluster)


@cluster_app.command("status")
def cluster_status(where: Where = "local", folder: Folder = None, debug: Debug = False) -> None:
    """Show the services, addresses and resources of the local cluster; exit code 1 if a service does not run."""
    with explained(debug):
        from cluster.errors import ClusterError
        from cluster.local import default_folder, find, processes

        _check_local(where)
        place = folder or default_folder()
        cluster = find(place)
        if cluster is None:
            raise ClusterError(f"no cluster is up in {place}")
        if not processes(cluster):
            raise ClusterError(f"the cluster in {place} ended with its machine or was killed; start it by `cluster up`")
        if not _show(cluster):
            raise typer.Exit(1)


def _show(cluster: "LocalCluster") -> bool:
    """Print the services and addresses; returns whether every service runs and Ray answers."""
    from rich.table import Table

    from cluster.local import resources, states

    services = states(cluster)
    if not services:
        typer.echo(
            f"the supervisor of the cluster in {cluster.folder} is gone; `cluster down` ends what it left", err=True
        )
        return False
    table = Table("service", "state", "")
    for name, state in services.items():
        table.add_row(name, state.name.lower(), state.description)
    screen = console()
    screen.print(table)
    is_answering = True
    try:
        amounts = sorted((name, amount) for name, amount in resources(cluster).items() if name in ("CPU", "GPU"))
        shown = ", ".join(f"{name} {amount:g}" for name, amount in amounts)
    except (OSError, ValueError, KeyError) as error:
        is_answering, shown = False, f"does not answer ({type(error).__name__})"
    rows = {
        "jobs": cluster.dashboard,
        "mlflow": cluster.tracking_uri,
        "s3": cluster.s3_endpoint or "none",
        "resources": shown,
        "logs": cluster.logs,
        "use it": f"source {cluster.environment_file}",
    }
    for label, value in rows.items():
        screen.print(f"{label:<10} {value}", highlight=False, markup=False, soft_wrap=True)
    return is_answering and all(state.name == "RUNNING" for state in services.values())


@cluster_app.command("down")
def cluster_down(where: Where = "local", folder: Folder = None, debug: Debug = False) -> None:
    """Stop exactly the processes that `up` started, also after a crash; the folder with data and logs stays."""
    with explained(debug):
        from cluster.local import default_folder, down

        _check_local(where)
        place = folder or default_folder()
        with console().status("stopping"):
            count = down(place)
        typer.echo(f"stopped {count} processes; MLflow's records, the S3 store's objects and the logs stay in {place}")
        typer.echo("deleted: Ray's session, and with it the working directories of submitted jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOptions:
    """Options of `cluster render`."""

    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("cluster-files")
    sweep: Annotated[bool, typer.Option("--sweep", help="For the file's sweep instead of the one run.")] = False
    image: Annotated[str, typer.Option(help="Container image, built from cluster/files/Containerfile.")] = (
        "orchestrator:0.1.0"
    )
    memory_gib: Annotated[
        int | None, typer.Option(help="Memory of each worker, GiB; default: 2 for each CPU, at least 6.")
    ] = None
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the memory in a few steps of one worker's share, on this machine."),
    ] = False
    spot: Annotated[
        bool, typer.Option(help="Use cheaper workers that the provider may take away; the run continues without them.")
    ] = True
    retries: Annotated[
        int, typer.Option(min=0, help="Kubernetes: how often a failed job is started again on a new cluster.")
    ] = 3
    region: Annotated[str | None, typer.Option(help="AWS: region.")] = None
    instance_profile: Annotated[
        str | None, typer.Option(help="AWS: instance profile whose role may use the buckets.")
    ] = None
    worker_type: Annotated[str, typer.Option(help="AWS: instance type that holds one worker.")] = "g5.2xlarge"


@cluster_app.command("render")
@takes_options(RenderOptions)
def cluster_render(
    *,
    target: Annotated[
        str, typer.Argument(help="kuberay: a RayJob and MLflow for Kubernetes; aws: a file for `ray up`.")
    ],
    experiment: Experiment,
    overrides: Overrides = None,
    debug: Debug = False,
    options: RenderOptions,
) -> None:
    """Write the files that start the machines an experiment needs; starts nothing, and writes no secret."""
    with explained(debug):
        from workloads.errors import RequestError

        if target not in ("kuberay", "aws"):
            raise RequestError(f"{target}: give kuberay or aws")
        if target == "aws" and (options.region is None or options.instance_profile is None):
            raise RequestError("--region and --instance-profile: aws needs both; the role takes the place of keys")
        from orchestrator.experiments.load import load_experiment, load_sweep

        arguments = overrides or []
        loaded = load_sweep(experiment, arguments) if options.sweep else load_experiment(experiment, arguments)
        from orchestrator.launch.machines import MachineOptions, render_aws, render_kuberay, request_of, write_files

        request = request_of(
            loaded,
            MachineOptions(
                image=options.image,
                memory_gib=options.memory_gib,
                measure=options.measure,
                spot=options.spot,
                retries=options.retries,
            ),
        )
        if target == "kuberay":
            files = render_kuberay(request)
        else:
            files = render_aws(
                request,
                region=options.region or "",
                instance_profile=options.instance_profile or "",
                worker_type=options.worker_type,
            )
        for path in write_files(options.output, files):
            typer.echo(path)
