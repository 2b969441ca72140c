"""`ls`, `validate`, `doctor` and `data`: what there is, and whether it is as it should be."""

from __future__ import annotations

from typing import Annotated

import typer

from metabench.cli.terminal import DataRoot, console, print_text, use_data_root, width
from metabench.errors import ConfigError

DataName = Annotated[str, typer.Argument(help="A data set that has files; see `metabench data ls`.")]


def ls(
    what: Annotated[str, typer.Argument(help="algorithms, datasets, backbones, kernels, suites, or all.")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List what there is, one line each, with the paper."""
    from metabench import listing

    found = listing.ls(what)
    print_text(listing.as_json(found) if as_json else listing.as_text(found, width()))


def validate(
    suite: Annotated[list[str] | None, typer.Argument(help="Shipped suites or YAML files.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of suites and exit.")] = False,
) -> None:
    """Check suites without running them: every mistake at once, with line numbers."""
    import json

    from metabench import suite as suites

    if schema:
        typer.echo(json.dumps(suites.schema(), indent=2))
        return
    if not suite:
        raise ConfigError("name a suite or a YAML file to validate, or ask for --schema")
    mistakes: list[str] = []
    for name in suite:
        try:
            found = suites.load_suite(name)
            cells = found.cells()
        except ConfigError as error:
            mistakes.append(str(error))
            continue
        trainings = {cell.training_id for cell in cells if cell.train}
        typer.echo(f"{found.path}: good; {len(cells)} cells, {len(trainings)} trainings")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """How well this machine can measure time, and what to do about what disturbs it."""
    from metabench import doctor as examiner

    typer.echo("measuring this machine; about ten seconds where it is idle ...", err=True)
    machine = examiner.examine()
    if as_json:
        print_text(examiner.as_json(machine))
        return
    examiner.show(machine, console())


data = typer.Typer(help="Data sets: what is there, download with checksum, check.", no_args_is_help=True)


@data.command("ls")
def data_ls(data_root: DataRoot = None) -> None:
    """Which data sets there are, and whether their files are."""
    from metabench import listing

    use_data_root(data_root)
    for status in listing.data_ls():
        typer.echo(f"{status.name:12} {status.state:9} {status.detail}")


@data.command("fetch")
def data_fetch(name: DataName, data_root: DataRoot = None) -> None:
    """Download a data set with its checksum (or take it from the data root), and decode it into the cache."""
    from metabench import listing

    use_data_root(data_root)
    status = listing.data_module(name, "fetch").fetch()
    typer.echo(f"{status.name}: {status.state}; {status.detail}")


@data.command("verify")
def data_verify(name: DataName, data_root: DataRoot = None) -> None:
    """Read a data set again from its source and compare it with its golden content hash."""
    from metabench import listing

    use_data_root(data_root)
    status = listing.data_module(name, "verify").verify()
    typer.echo(f"{status.name}: {status.state}; {status.detail}")
