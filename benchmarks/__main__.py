"""`python -m benchmarks NAME`: run a benchmark, print its table. Without a name: list them."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import click

from antdist.errors import UserError
from antdist.io.logs import setup_logging
from benchmarks.machine import cores, machine
from benchmarks.report import Options, Report, format_report, to_json

NAMES = {
    "throughput": "training: predictions/s against the usual way (padded, one prefix an example, B x N logits)",
    "loss": "the chunked softmax: extra memory and seconds, up to 1,000,000 candidates",
    "stream": "users/s from shards in the page cache, shuffled, against a webdataset pipeline of samples",
    "ranking": "full ranking by counting, against sorting the masked score matrix",
    "score": "top 10 of every user, from shards to Parquet: users/s against one user at a time",
    "scaling": "predictions/s of 2 workers over 1, the same work a worker",
    "startup": "antdist --help in a fresh process",
    "prepare": "10 million interactions from CSV to shards: rows/s and peak memory, against pandas",
    "append": "1 % of 10 million interactions appended to a domain, against preparing it from scratch",
    "overhead": "share of a run that logging, progress, checkpoints and waiting for data take",
    "modes": "predictions/s of `sequence` over `prefix` training",
    "quality": "test metrics of `sequence` against `prefix` training on real data, and both curves against wall time",
    "honest_world": "quality: the generated world rewards the order of items, not only their set",
    "plan": "antdist plan: predicted and measured seconds and memory of a step at three sizes",
    "soak": "training under random faults, kills and damaged checkpoints: the cost of each, and an unchanged result",
    "gpu": "predictions/s, MFU and memory on a GPU, plain and DeepSpeed",
}


def run(name: str, options: Options) -> Report:
    """Run one benchmark by name, in this process."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported, as for antdist's workers
    import torch

    torch.set_num_threads(options.threads)
    report: Report = importlib.import_module(f"benchmarks.{name}").run(options)
    return report


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False, type=click.Choice(list(NAMES)), metavar="[NAME]")
@click.option("--short", is_flag=True, help="Run a tiny form, to show that it works; its figures mean nothing.")
@click.option("--repeats", type=click.IntRange(1), help="Measured rounds. Default: 5; 2 with --short.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch. Default: all available cores.")
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A prepared domain DATA/NAME."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curves to FILE (svg, png).")
@click.option("--minutes", type=click.FloatRange(0.1), default=20.0, help="soak: how long to run. Default: 20.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures to FILE."
)
def main(
    name: str | None,
    short: bool,
    repeats: int | None,
    threads: int | None,
    data: Path | None,
    settings: tuple[str, ...],
    picture: Path | None,
    minutes: float,
    json_file: Path | None,
) -> None:
    """Measure one part of antdist against the usual way of doing it. Without NAME: list them."""
    if name is None:
        click.echo("\n".join(f"{known:13} {what}" for known, what in NAMES.items()))
        return
    setup_logging()
    options = Options(short, repeats or (2 if short else 5), threads or cores(), data, settings, picture, minutes)
    facts = machine(options.threads)
    try:
        report = run(name, options)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    click.echo(format_report(report, facts))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(report, facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
