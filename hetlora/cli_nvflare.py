"""The group `nvflare` of commands. Running a job is NVFLARE's own."""

from __future__ import annotations

from pathlib import Path

import click

from hetlora.deployed.template import write_template

TEMPLATE = Path(__file__).parent / "nvflare" / "template"
PLACES = {"job.py.txt": "job.py", "client.py.txt": "client.py", "README.md.txt": "README.md"}


@click.group()
def nvflare() -> None:
    """Jobs for NVIDIA FLARE: make one."""


@nvflare.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def new(folder: Path) -> None:
    """Write an NVFLARE job with this project's settings into the new folder DIR."""
    for path in write_template(TEMPLATE, PLACES, folder):
        click.echo(f"written: {path}")
