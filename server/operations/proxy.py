"""The proxy in front of the SuperLink: nginx's configuration, and where nginx is.

Flower 1.41 serves Fleet, Control and Runtime API on one port, and the Control API asks nobody who
they are. So the SuperLink listens on the loopback interface only, and the proxy is the one way in.

**Guarantee**: a request from outside reaches the SuperLink at one of the constant paths of
`FLEET_PATHS`, by POST, over TLS 1.3, or not at all: each path is an exact match and is sent on as
a constant of its own, so that no spelling (dots, encoded slashes, fragments) that proxy and
SuperLink read differently can name another one.
"""

import os
import shutil
import socket
from pathlib import Path

from ...common.file_templates import render

__all__ = ["FLEET_PATHS", "find_nginx", "nginx_conf"]

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


def find_nginx() -> Path | None:
    """Find nginx on PATH or in /usr/sbin. None: there is none."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    return Path(found) if found else None


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
    return render(
        __package__,
        "nginx.conf",
        port=port,
        inner=inner,
        ipv6=_has_ipv6(),
        root=os.getuid() == 0,
        paths=FLEET_PATHS,
    )
