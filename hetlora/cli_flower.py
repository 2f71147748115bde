"""The commands that lead to Flower: serve, join and the group `flower`. They write out Flower's own commands, and become them."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from hetlora.extras import install
from hetlora.flower import launch

_folder = click.Path(path_type=Path)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for other machines, with --tls.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port.")
@click.option("--tls", type=_folder, help="Folder with ca.crt, server.pem and server.key ('hetlora flower certificates' makes some for tests).")
@click.option("--known-clients", is_flag=True, help="Only nodes whose keys were registered with 'flwr supernode register' may join.")
@click.option("--database", type=_folder, help="File of Flower's own state, so that it survives a restart of the server.")
@click.option("--simulation", is_flag=True, help="Clients are simulated by Flower, in Ray's processes on this machine.")
def serve(host: str, port: int, tls: Path | None, known_clients: bool, database: Path | None, simulation: bool) -> None:
    """Start the server of a federation: a Flower SuperLink. 'hetlora flower run' starts a run on it."""
    launch.become(launch.serve_command(host, port, tls, known_clients, database, simulation))


@click.command()
@click.argument("server", metavar="HOST:PORT")
@click.argument("settings", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--port", type=click.IntRange(1, 65535), default=9094, show_default=True, help="Port for this node's own processes, another one for each node.")
@click.option("--ca", type=_folder, help="Certificate of the authority that signed the server's; needed for a server on another machine.")
@click.option("--key", type=_folder, help="This node's private key, for a server with --known-clients.")
def join(server: str, settings: tuple[str, ...], port: int, ca: Path | None, key: Path | None) -> None:
    """Join the federation at HOST:PORT as one client: a Flower SuperNode.

    NAME=VALUE: settings of this node: client, partition-id, model, data, dtype, device, quantize, max-tokens-per-step,
    gradient-checkpointing.
    """
    launch.become(launch.join_command(server, port, settings, ca, key))


@click.group()
def flower() -> None:
    """Apps for Flower: make one, run it, make certificates for a test."""


@flower.command()
@click.argument("folder", metavar="DIR", type=_folder)
def new(folder: Path) -> None:
    """Write a Flower app with this project's settings into the new folder DIR."""
    for path in launch.write_app(folder):
        click.echo(f"written: {path}")


@flower.command()
@click.argument("app", metavar="APP", type=_folder, default=Path("."))
@click.argument("changes", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--server", default="127.0.0.1:8000", show_default=True, metavar="HOST:PORT", help="The server that 'hetlora serve' started.")
@click.option("--ca", type=_folder, help="Certificate of the authority that signed the server's.")
@click.option("--simulation", type=click.IntRange(1), metavar="N", help="With N clients on a server that 'hetlora serve --simulation' started.")
def run(app: Path, changes: tuple[str, ...], server: str, ca: Path | None, simulation: int | None) -> None:
    """Run the app in the folder APP on a server, and follow its log. NAME=VALUE changes settings of its pyproject.toml."""
    home = (app / ".flwr").resolve()
    command, more = launch.run_command(app, server, changes, home, ca), {"FLWR_HOME": str(home)}
    if simulation:
        launch.first(launch.simulation_command(simulation), more)
    launch.become(command, more)


@flower.command()
@click.argument("folder", metavar="DIR", type=_folder)
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
def certificates(folder: Path, hosts: tuple[str, ...]) -> None:
    """Write certificates for a test into DIR, for a server that is reached as HOST (names or addresses)."""
    try:
        module = importlib.import_module("hetlora.flower.certificates")
    except ImportError as error:
        raise ImportError(f"certificates are made with Flower's cryptography package ({error}); install it with: {install('flower')}") from None
    for path in module.write_certificates(folder, list(hosts)):
        click.echo(f"written: {path}")
