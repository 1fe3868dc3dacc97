"""What runs at the server: three programs, as commands, as systemd units, and in its README."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .proxy import find_nginx

if TYPE_CHECKING:
    from .server_folder import Server

__all__ = ["commands", "environment", "readme", "units"]


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
    about = {
        "superlink": "privet: SuperLink (keeps nodes, messages and runs)",
        "superexec": "privet: SuperExec (starts the run's server part)",
        "proxy": "privet: proxy (the one way in from outside)",
    }
    passed = {name: value for name, value in environment(server).items() if name != "PATH"}
    passed["PATH"] = os.pathsep.join([str(_bin()), "/usr/local/bin", "/usr/bin", "/bin"])
    settings = "\n".join(
        f"Environment={_unit_word(f'{name}={value}')}" for name, value in passed.items()
    )
    after = {"superexec": "privet-superlink.service", "proxy": "privet-superlink.service"}
    found = {}
    for name, command in commands(server).items():
        needs = after.get(name)
        order = (
            f"Wants={needs}\nAfter=network-online.target {needs}"
            if needs
            else ("After=network-online.target")
        )
        reload = ""
        if name == "proxy":
            again = (*command, "-s", "reload")
            reload = f"ExecReload={' '.join(map(_unit_word, again))}\n"
        found[f"privet-{name}.service"] = f"""[Unit]
Description={about[name]}
{order}

[Service]
User={_user()}
WorkingDirectory={str(server.folder).replace("%", "%%")}
UMask=0077
{settings}
ExecStart={" ".join(map(_unit_word, command))}
{reload}Restart=always
RestartSec=2
KillSignal=SIGTERM
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""
    return found


def _unit_word(word: str) -> str:
    """One argument in systemd's syntax: quoted, its specifiers and variables taken as text."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _user() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return "privet"


def readme(server: "Server") -> str:
    import shlex

    variables = {name: value for name, value in environment(server).items() if name != "PATH"}
    settings = " \\\n    ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    lines = "\n".join(f"    {shlex.join(command)}" for name, command in commands(server).items())
    host = server.hosts[0]
    where = f"[{host}]" if ":" in host else host
    folder = shlex.quote(str(server.folder))
    return f"""# A privet server

Made by `privet server init`. The folder is for you alone (0700) and must stay at this path; back
it up as a whole while nothing runs.

1. **Move `ca/` away from this machine** (a USB stick in a drawer, a password manager). Who has
   `ca/ca.key` can pretend to be this server to every device. It is needed once a year:
   `privet server init {folder} --renew --ca-key /mnt/stick/ca.key`, then start everything again.
2. Start: `privet server up {folder}` while you try it; for good:
   `sudo cp systemd/*.service /etc/systemd/system/ && sudo systemctl daemon-reload &&
   sudo systemctl enable --now privet-superlink privet-superexec privet-proxy`.
3. Open port {server.port} in the firewall, and no other: port {server.inner_port} answers on
   this machine only and must stay so, because it asks nobody who they are. Who has a login here
   can start runs.
4. Give every person `ca.crt` by a way you both trust, and this line:
   `privet client join --server {where}:{server.port} --ca ca.crt`
5. Take the cards that `privet client card` prints on the devices:
   `privet server enrol {folder} CARD.json…`
6. A run: `privet server run {folder} CONFIG.toml`, with `data.source = "devices"`; then
   `privet server status {folder}`.

The SuperLink's database `state.sqlite` has messages in transit: masked contributions only.
`runs/` has every run's settings, round log and adapter. nginx keeps no access log.

What runs, without a shell in between (environment first):

    env {settings} \\
    PROGRAM

{lines}
"""
