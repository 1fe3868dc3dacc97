"""The proxy in front of the SuperLink: nginx's configuration, and where nginx is.

Flower 1.41 serves Fleet, Control and Runtime API on one port, and the Control API asks nobody who
they are. So the SuperLink listens on the loopback interface only, and the proxy is the one way in.

**Guarantee**: a request from outside reaches the SuperLink at one of the constant paths of
`FLEET_PATHS`, by POST, over TLS 1.3, or not at all: each path is an exact match and is sent on as
a constant of its own, so that no spelling (dots, encoded slashes, fragments) that proxy and
SuperLink read differently can name another one.
"""

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...common.errors import AssetError
from ...common.files import explain_os_errors

__all__ = ["FLEET_PATHS", "find_nginx", "find_or_fetch_nginx", "nginx_conf"]

# What a SuperNode of flwr 1.41 with a registered key calls, read off
# flwr/supernode/fleet_http_connection.py (all of them POST). `register-node` and
# `unregister-node` are of SuperNodes that register themselves, which the SuperLink refuses.
FLEET_PATHS = (
    "/v1/fleet/activate-node",
    "/v1/fleet/deactivate-node",
    "/v1/fleet/send-node-heartbeat",
    "/v1/fleet/pull-messages",
    "/v1/fleet/push-messages",
    "/v1/fleet/get-run",
    "/v1/fleet/get-fab",
    "/v1/fleet/pull-object",
    "/v1/fleet/push-object",
    "/v1/fleet/confirm-message-received",
)


def find_nginx(cache: Path | None = None) -> Path | None:
    """Find nginx on PATH, in /usr/sbin, or fetched into `cache` before. None: there is none."""
    named = shutil.which("nginx")
    places = [Path(named)] if named else []
    places.append(Path("/usr/sbin/nginx"))
    if cache is not None:
        places.append(cache / "nginx" / "usr" / "sbin" / "nginx")
    return next((place for place in places if os.access(place, os.X_OK)), None)


def find_or_fetch_nginx(cache: Path) -> Path:
    """`find_nginx`, or Debian's package unpacked below `cache`: no root, nothing installed.

    apt checks the package's signature chain as it does for an installation.

    Raises:
        AssetError: there is none, and it could not be fetched.
    """
    found = find_nginx(cache)
    if found:
        return found
    partial = cache / f".nginx.{secrets.token_hex(4)}"
    try:
        with explain_os_errors(cache, "unpack nginx into"):
            partial.mkdir(parents=True)
            _call(["apt-get", "download", "nginx"], partial)
            for package in sorted(partial.glob("*.deb")):
                _call(["dpkg", "-x", str(package), "."], partial)
                package.unlink()
            if (cache / "nginx").exists():
                shutil.rmtree(cache / "nginx")
            os.replace(partial, cache / "nginx")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = find_nginx(cache)
    if found is None:
        raise AssetError("the package nginx has no usr/sbin/nginx; install nginx yourself")
    _call([str(found), "-v"], cache)  # its libraries are there
    return found


def _call(command: Sequence[str], folder: Path) -> None:
    advice = "install it: sudo apt install nginx (or your system's package of that name)"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetError(f"nginx could not be fetched ({command[0]}: {error}); {advice}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssetError(f"nginx could not be fetched ({command[0]}: {last}); {advice}")


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def nginx_conf(port: int, inner: str) -> str:
    """Write nginx's configuration. Its paths are relative to the server's folder (`-p`).

    Args:
        port: the proxy's, seen from outside.
        inner: the SuperLink's address on this machine.
    """
    listen = f"listen {port} ssl;"
    if _has_ipv6():
        listen += f"\n        listen [::]:{port} ssl;"
    places = "\n".join(
        f"        location = {path} {{ limit_except POST {{ deny all; }} "
        f"proxy_pass https://superlink{path}; }}"
        for path in FLEET_PATHS
    )
    # started by root, nginx would give its workers to nobody, who cannot read this folder
    account = "user root;\n" if os.getuid() == 0 else ""
    return f"""# The one way in from outside; written by `privet server init`.
daemon off;
{account}worker_processes auto;
pid nginx/nginx.pid;
error_log nginx/error.log crit;

events {{
    worker_connections 4096;
}}

http {{
    # Who connected, and when, is about people: it is not kept (error.log: crit only).
    access_log off;
    server_tokens off;
    client_body_temp_path nginx/body;
    proxy_temp_path nginx/proxy;
    fastcgi_temp_path nginx/fastcgi;
    uwsgi_temp_path nginx/uwsgi;
    scgi_temp_path nginx/scgi;

    # For each address, generous: a household or an office may share one. A device at rest asks
    # once in 3 s, one in a round some dozen times a second.
    limit_req_zone $binary_remote_addr zone=requests:10m rate=500r/s;
    limit_conn_zone $binary_remote_addr zone=connections:10m;

    upstream superlink {{
        server {inner};
        keepalive 32;
    }}

    server {{
        {listen}
        ssl_certificate certificates/server.crt;
        ssl_certificate_key certificates/server.key;
        ssl_protocols TLSv1.3;
        ssl_session_tickets off;

        limit_req zone=requests burst=5000 nodelay;
        limit_conn connections 2000;
        # Flower cuts arrays into pieces of 5 MiB; one masked vector travels whole.
        client_max_body_size 64m;
        client_header_timeout 10s;
        client_body_timeout 60s;
        send_timeout 60s;
        keepalive_timeout 75s;

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        proxy_connect_timeout 5s;
        proxy_read_timeout 60s;
        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate certificates/internal-ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_server_name on;
        proxy_ssl_protocols TLSv1.3;

        # Exact matches, each sent on as a constant: no spelling reaches another path.
{places}
        location / {{ return 404; }}
    }}
}}
"""
