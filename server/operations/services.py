"""What runs at the server: three programs, as commands, as systemd units, and in its README."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.child_processes import Spec
from ...common.file_templates import render, systemd_word
from .proxy import find_nginx

if TYPE_CHECKING:
    from .server_folder import Server

__all__ = ["commands", "environment", "programs", "readme", "units"]

ABOUT = {
    "superlink": "SuperLink (keeps nodes, messages and runs)",
    "superexec": "SuperExec (starts the run's server part)",
    "proxy": "proxy (the one way in from outside)",
}


def commands(server: "Server", nginx: Path | None = None) -> Mapping[str, tuple[str, ...]]:
    """Return the server's programs as argument lists: `superlink`, `superexec`, `proxy`.

    No shell is involved.

    They need `environment`. SuperLink and SuperExec are separate, so that a SuperLink that is
    killed in the middle of a round and started again finishes the run.
    """
    at = server.certificate
    secret = ("--superexec-auth-secret-file", str(server.folder / "superexec.secret"))
    superlink = (
        _program("flower-superlink"), "--host", "127.0.0.1", "--port", str(server.inner_port),
        "--ssl-certfile", str(at("internal.crt")), "--ssl-keyfile", str(at("internal.key")),
        "--ssl-ca-certfile", str(at("internal-ca.crt")), "--enable-supernode-auth",
        "--isolation", "process", "--database", str(server.folder / "state.sqlite"),
        "--disable-runtime-dependency-installation", *secret,
    )  # fmt: skip
    superexec = (
        _program("flower-superexec"), "--runtime-api-address", server.inner,
        "--root-certificates", str(at("internal-ca.crt")), *secret,
    )  # fmt: skip
    proxy = (
        str(nginx or find_nginx() or "/usr/sbin/nginx"), "-p", f"{server.folder}/",
        "-c", str(server.folder / "nginx.conf"), "-e", str(server.folder / "nginx" / "error.log"),
    )  # fmt: skip
    return {"superlink": superlink, "superexec": superexec, "proxy": proxy}


def programs(server: "Server", nginx: Path | None = None) -> list[Spec]:
    """The server's programs as children of `privet server up`, each with a log of its own."""
    logs, variables = server.folder / "logs", environment(server)
    return [
        Spec(name, command, env=variables, log=logs / f"{name}.log")
        for name, command in commands(server, nginx).items()
    ]


def environment(server: "Server") -> Mapping[str, str]:
    """Variables that `commands` need on top of the caller's.

    `PATH` because the SuperExec starts `flwr-serverapp` by name.
    """
    return {
        "FLWR_HOME": str(server.folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": os.pathsep.join([str(_bin()), os.environ.get("PATH", os.defpath)]),
    }


def _bin() -> Path:
    """Where the programs of this Python environment are."""
    return Path(sys.executable).parent


def _program(name: str) -> str:
    beside = _bin() / name
    return str(beside) if beside.exists() else (shutil.which(name) or str(beside))


def units(server: "Server") -> Mapping[str, str]:
    """System units that run as the user who made the folder."""
    path = os.pathsep.join([str(_bin()), "/usr/local/bin", "/usr/bin", "/bin"])
    return {
        f"privet-{name}.service": render(
            __package__,
            "unit.service",
            name=name,
            about=ABOUT[name],
            user=_user(),
            folder=str(server.folder),
            environment={**environment(server), "PATH": path},
            command=" ".join(
                systemd_word(word, in_command=place > 0) for place, word in enumerate(command)
            ),
        )
        for name, command in commands(server).items()
    }


def _user() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return "privet"


def readme(server: "Server") -> str:
    """The steps of an operator, in order: README.md of the server's folder."""
    host = server.hosts[0]
    return render(
        __package__,
        "README.md",
        folder=server.folder,
        port=server.port,
        inner_port=server.inner_port,
        host=f"[{host}]" if ":" in host else host,
        environment={name: one for name, one in environment(server).items() if name != "PATH"},
        commands=[shlex.join(command) for command in commands(server).values()],
    )
