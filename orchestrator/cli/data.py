"""The `data` commands: build, regions, verify and stats."""

from typing import Annotated

import typer

from orchestrator.cli.root import data_app
from orchestrator.cli.terminal import Debug, Overrides, TrackingUri, counting, explained


@data_app.command("build")
def data_build(
    source: Annotated[str, typer.Option(help="Layout of the input: folder, coco, voc, caltech101 or parquet.")],
    input: Annotated[list[str], typer.Option(help="Folder, file or URI of the images; may be given again.")],
    output: Annotated[str, typer.Option(help="Folder of the shards, or s3://bucket/prefix.")],
    regions: Annotated[
        list[str] | None,
        typer.Option(
            help="Region masks to store: grid, felzenszwalb, slic, panoptic or column:NAME; may be given again."
        ),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS", help="Address of a Ray cluster to build on; local: start a Ray on this machine."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Convert images to Parquet shards: `orchestrator data build … short_side=256 val_share=0.1 --regions felzenszwalb`.

    Without an address it runs in this process on all cores; with one, as Ray tasks on the cluster.
    """
    with explained(debug):
        from orchestrator.datasets.build import build_parts
        from orchestrator.ray_support.session import connect
        from workloads.config import apply_overrides, build, parse_overrides
        from workloads.data.build.shards import BuildConfig

        columns = {kind: {"name": name} if name else {} for kind, _, name in (r.partition(":") for r in regions or [])}
        data = {"source": {"kind": source, "inputs": input}, "output": output, "regions": columns}
        config = build(BuildConfig, apply_overrides(data, parse_overrides(overrides or [])))
        if address:
            connect(address, debug=debug)
        with counting("images") as progress:
            manifests = build_parts(config, progress=progress, on_ray=bool(address))
        for part, manifest in manifests.items():
            typer.echo(
                f"{part + ': ' if part else ''}{manifest.num_images} images in {len(manifest.shards)} shards, "
                f"{manifest.rejects.rows} rejects, manifest {manifest.sha256}"
            )


@data_app.command("regions")
def data_regions(
    uri: Annotated[str, typer.Argument(help="Folder or URI of a dataset.")],
    figure: Annotated[str, typer.Option(help="PNG file to draw.")],
    name: Annotated[str | None, typer.Option(help="Column of regions; default: all.")] = None,
    images: Annotated[int, typer.Option(min=1, max=100, help="How many images to draw, from the first on.")] = 8,
    debug: Debug = False,
) -> None:
    """Draw images with their region masks."""
    with explained(debug):
        from orchestrator.datasets.region_figure import draw_regions

        typer.echo(f"figure  {draw_regions(uri, figure, name=name, count=images)}")


@data_app.command("verify")
def data_verify(
    uri: Annotated[str, typer.Argument(help="Folder or URI of a dataset.")],
    decode_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the images to decode.")] = 1.0,
    debug: Debug = False,
) -> None:
    """Read a dataset and check its hashes, its row counts, and that its images decode."""
    with explained(debug):
        from orchestrator.datasets.verify import verify_dataset

        with counting("images") as progress:
            report = verify_dataset(uri, progress=progress, decode_share=decode_share)
        typer.echo(report)


@data_app.command("stats")
def data_stats(
    uri: Annotated[str, typer.Argument(help="Folder or URI of a dataset.")],
    figure: Annotated[str | None, typer.Option(help="Draw the distributions to this PNG file.")] = None,
    log_to: Annotated[
        str | None, typer.Option(help="MLflow run id or name to which table and figure are logged.")
    ] = None,
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Show the counts, sizes and rejects of a dataset."""
    with explained(debug):
        from orchestrator.datasets.stats import dataset_stats, draw_stats, log_stats

        stats = dataset_stats(uri)
        typer.echo(stats)
        if figure is not None:
            typer.echo(f"figure       {draw_stats(stats, figure)}")
        if log_to is not None:
            typer.echo(f"logged to    run {log_stats(stats, log_to, tracking_uri=tracking_uri)}, report/data")
