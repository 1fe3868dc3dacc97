"""A server's folder and what was chosen when it was made."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CERTIFICATES", "Server"]

CERTIFICATES = "certificates"


@dataclass(frozen=True)
class Server:
    """A server's folder and what was chosen when it was made.

    Attributes:
        folder: absolute.
        hosts: names and addresses in the server's certificate.
        port: the proxy's, seen from outside.
        inner_port: the SuperLink's, on 127.0.0.1 only.
    """

    folder: Path
    hosts: tuple[str, ...]
    port: int
    inner_port: int

    @property
    def inner(self) -> str:
        """Address of the SuperLink on this machine."""
        return f"127.0.0.1:{self.inner_port}"

    def certificate(self, name: str) -> Path:
        """Path of a current certificate or key."""
        return self.folder / CERTIFICATES / name
