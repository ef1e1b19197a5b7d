"""The `emberbox` command: words and options. What they do is in the modules beside this one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from emberbox import __version__
from emberbox.cli.errors import CliError
from emberbox.cli.output import err, open_closed_streams
from emberbox.settings import Settings

# Commands import what they need when they run: `emberbox env` must not wait for gRPC and the rest.

app = typer.Typer(
    name="emberbox",
    help="A self-hosted sandbox cloud for AI agents that speaks the E2B API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
key_app = typer.Typer(help="API keys of the first team.", no_args_is_help=True)
sandbox_app = typer.Typer(help="Sandboxes of the first team.", no_args_is_help=True)
app.add_typer(key_app, name="key")
app.add_typer(sandbox_app, name="sandbox")
template_app = typer.Typer(help="Templates of the first team.", no_args_is_help=True)
app.add_typer(template_app, name="template")
skill_app = typer.Typer(help="The Agent Skill.", no_args_is_help=True)
app.add_typer(skill_app, name="skill")

Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Data directory \\[default: /var/lib/emberbox]", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Template = Annotated[str, typer.Argument(metavar="TEMPLATE", help="Name or ID.")]
SandboxId = Annotated[str, typer.Argument(metavar="SANDBOX", help="Sandbox ID.")]


def settings_from(**given: Any) -> Settings:
    """Settings with the options that were given; the rest from the environment and the defaults.

    Raises:
        CliError: a value that cannot be used.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise CliError("these settings cannot be used: " + "; ".join(problems), code=2) from None


def run() -> None:
    """Run the command line; every expected failure becomes one sentence and an exit code."""
    open_closed_streams()
    try:
        app()
    except CliError as error:
        err.print(f"emberbox: {error.message}", style="red" if err.is_terminal else "", markup=False)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True, expose_value=True)
    ] = False,
) -> None:
    """A self-hosted sandbox cloud for AI agents that speaks the E2B API."""


@app.command()
def up(
    data: Data = None,
    runtime: Annotated[
        Literal["auto", "firecracker", "container"] | None,
        typer.Option(help="How to isolate sandboxes \\[default: auto]."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Serve in the background; return when ready.")] = False,
    domain: Annotated[
        str | None, typer.Option(help="Base domain of sandbox addresses \\[default: localhost:PORT].")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address that the API and the edge listen on \\[default: 127.0.0.1].")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API \\[default: 3000].", min=1, max=65535)] = None,
    edge_port: Annotated[
        int | None, typer.Option(help="Port of sandbox traffic \\[default: 3002].", min=1, max=65535)
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM) for sandbox traffic over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    tls_port: Annotated[
        int | None, typer.Option(help="Port of sandbox traffic over TLS \\[default: 3443].", min=1, max=65535)
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="PostgreSQL URL instead of SQLite.")] = None,
    slot_network: Annotated[
        str | None,
        typer.Option(
            metavar="CIDR",
            help="Addresses for machines; each instance on a host needs its own \\[default: 198.18.0.0/16].",
        ),
    ] = None,
    inherit_host_network: Annotated[
        bool | None,
        typer.Option(
            "--inherit-host-network", help="Give sandboxes the host's CA bundle, resolver and package settings."
        ),
    ] = None,
    user: Annotated[str | None, typer.Option(help="Unprivileged user of api and edge \\[default: emberbox].")] = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"] | None, typer.Option()] = None,
) -> None:
    """Start Emberbox and keep it running; Ctrl-C stops it and leaves its sandboxes for the next `up`."""
    from emberbox.cli import up as command

    settings = settings_from(
        data_dir=data,
        runtime=runtime,
        domain=domain,
        api_host=host,
        edge_host=host,
        api_port=port,
        edge_port=edge_port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        edge_tls_port=tls_port,
        database_url=database_url,
        slot_network=slot_network,
        inherit_host_network=inherit_host_network,
        api_user=user,
        log_level=log_level,
    )
    if detach:
        command.up_in_background(settings)
    else:
        command.up_in_foreground(settings)


@app.command()
def down(
    data: Data = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave running sandboxes running for the next `up`.")] = False,
) -> None:
    """Stop Emberbox and end its running sandboxes."""
    from emberbox.cli import stopping

    stopping.down(settings_from(data_dir=data), keep=keep)


@app.command()
def env(data: Data = None, as_json: Json = False) -> None:
    """Print the variables for E2B clients: eval "$(emberbox env)"."""
    from emberbox.cli import exports
    from emberbox.cli.output import print_json

    settings = settings_from(data_dir=data)
    if as_json:
        print_json(exports.client_variables(settings))
    else:
        exports.print_exports(settings)


@app.command()
def status(data: Data = None, as_json: Json = False) -> None:
    """Show what runs; exit code 3 when nothing does."""
    from emberbox.cli import status as command

    raise typer.Exit(command.status(settings_from(data_dir=data), as_json=as_json))


@app.command()
def doctor(
    data: Data = None,
    runtime: Annotated[Literal["auto", "firecracker", "container"] | None, typer.Option()] = None,
    as_json: Json = False,
) -> None:
    """Check everything that Emberbox needs of this host; exit code 1 when something is missing."""
    from emberbox.cli import doctor as command

    raise typer.Exit(command.doctor(settings_from(data_dir=data, runtime=runtime), as_json=as_json))


@app.command()
def setup(
    data: Data = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Folder with the pinned firecracker and jailer; they are downloaded without it."),
    ] = None,
) -> None:
    """Install what microVMs need: Firecracker, its jailer, the guest's kernel. Containers need none of it."""
    from emberbox.cli import setup as command

    command.setup(settings_from(data_dir=data), source=source)


@app.command()
def api(data: Data = None) -> None:
    """Run the api role alone. Settings come from EMBERBOX_* variables."""
    from emberbox.cli import alone

    alone.run("api", settings_from(data_dir=data))


@app.command()
def node(data: Data = None) -> None:
    """Run the node role alone, as root. Settings come from EMBERBOX_* variables."""
    from emberbox.cli import alone

    alone.run("node", settings_from(data_dir=data))


@app.command()
def edge(data: Data = None) -> None:
    """Run the edge role alone. Settings come from EMBERBOX_* variables."""
    from emberbox.cli import alone

    alone.run("edge", settings_from(data_dir=data))


@app.command()
def mcp(data: Data = None) -> None:
    """Speak MCP on standard input and output, for desktop agents.

    Passes on to the Emberbox of E2B_API_URL with E2B_API_KEY; without them, to the one of the data directory.
    """
    from emberbox.cli import mcp as command

    command.bridge(settings_from(data_dir=data))


@key_app.command("create")
def key_create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may do, repeated for several: sandboxes:read, sandboxes:write, sandboxes:exec, templates, "
            "admin. Everything when left out."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many sandboxes that it made may live at once.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make an API key and print it, this once."""
    from emberbox.cli import sandboxes

    sandboxes.create_key(settings_from(data_dir=data), name, scopes=scope, limit=limit, as_json=as_json)


@key_app.command("list")
def key_list(data: Data = None, as_json: Json = False) -> None:
    """List API keys, masked."""
    from emberbox.cli import sandboxes

    sandboxes.list_keys(settings_from(data_dir=data), as_json=as_json)


@key_app.command("delete")
def key_delete(key_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """Delete an API key: it stops working at once."""
    from emberbox.cli import sandboxes

    sandboxes.delete_key(settings_from(data_dir=data), key_id)


@sandbox_app.command("list")
def sandbox_list(data: Data = None, as_json: Json = False) -> None:
    """List running and paused sandboxes."""
    from emberbox.cli import sandboxes

    sandboxes.list_sandboxes(settings_from(data_dir=data), as_json=as_json)


@sandbox_app.command("kill")
def sandbox_kill(
    sandbox_ids: Annotated[list[str] | None, typer.Argument(metavar="SANDBOX...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every sandbox of the team.")] = False,
    data: Data = None,
) -> None:
    """End sandboxes."""
    from emberbox.cli import sandboxes

    sandboxes.kill_sandboxes(settings_from(data_dir=data), sandbox_ids or [], everything=everything)


@sandbox_app.command("logs")
def sandbox_logs(
    sandbox_id: SandboxId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many of the newest entries.")] = 100,
    level: Annotated[
        Literal["debug", "info", "warn", "error"] | None, typer.Option(help="Lowest level to show.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show the newest log entries of a sandbox, oldest first."""
    from emberbox.cli import sandboxes

    sandboxes.show_logs(settings_from(data_dir=data), sandbox_id, limit=limit, level=level, as_json=as_json)


@sandbox_app.command("shell")
def sandbox_shell(
    sandbox_id: SandboxId,
    user: Annotated[str, typer.Option(help="User inside the sandbox.")] = "user",
    data: Data = None,
) -> None:
    """Open a terminal in a sandbox; it ends with the shell's exit code."""
    from emberbox.cli import shell

    raise typer.Exit(shell.shell(settings_from(data_dir=data), sandbox_id, user=user))


@template_app.command("list")
def template_list(data: Data = None, as_json: Json = False) -> None:
    """List templates, and those that ship with Emberbox."""
    from emberbox.cli import templates

    templates.list_templates(settings_from(data_dir=data), as_json=as_json)


@template_app.command("show")
def template_show(template: Template, data: Data = None, as_json: Json = False) -> None:
    """Show a template with its tags and builds."""
    from emberbox.cli import templates

    templates.show_template(settings_from(data_dir=data), template, as_json=as_json)


@template_app.command("build")
def template_build(
    template: Annotated[
        str, typer.Argument(metavar="NAME", help="A template that ships with Emberbox, or with --image a new one.")
    ],
    image: Annotated[str | None, typer.Option(metavar="REF", help="Build from this image, e.g. debian:12.")] = None,
    disk_mb_per_second: Annotated[
        int | None, typer.Option(min=0, metavar="MIB", help="What a sandbox may read, and write, in a second. 0: any.")
    ] = None,
    disk_operations_per_second: Annotated[
        int | None, typer.Option(min=0, metavar="COUNT", help="Reads, and writes, in a second. 0: any.")
    ] = None,
    network_mbit_per_second: Annotated[
        int | None, typer.Option(min=0, metavar="MBIT", help="What it may send, and receive, in a second. 0: any.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every step again.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Build a template and show its log. Your own, with files and steps: E2B's SDK or `e2b template create`."""
    from emberbox.cli import templates

    rates = {
        "diskMBPerSecond": disk_mb_per_second,
        "diskOperationsPerSecond": disk_operations_per_second,
        "networkMbitPerSecond": network_mbit_per_second,
    }
    templates.build_template(
        settings_from(data_dir=data), template, image=image, rates=rates, force=force, as_json=as_json
    )


@template_app.command("delete")
def template_delete(
    names: Annotated[list[str], typer.Argument(metavar="TEMPLATE...", help="Names or IDs.")], data: Data = None
) -> None:
    """Delete templates; sandboxes that run from them go on."""
    from emberbox.cli import templates

    templates.delete_templates(settings_from(data_dir=data), names)


@template_app.command("publish")
def template_publish(
    template: Template,
    private: Annotated[bool, typer.Option("--private", help="Take it back: for its own team alone.")] = False,
    data: Data = None,
) -> None:
    """Let every team of this Emberbox use a template."""
    from emberbox.cli import templates

    templates.publish_template(settings_from(data_dir=data), template, public=not private)


@skill_app.command("install")
def skill_install(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the agent looks for skills.")] = Path(
        ".agents/skills"
    ),
) -> None:
    """Write the skill into DIR/emberbox."""
    from emberbox.cli import skill

    print(skill.install(directory))
