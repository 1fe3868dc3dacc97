"""An nginx for the tests where none is installed: Debian's package, unpacked into the cache."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from privet.common.model.assets import cache_folder
from privet.server.operations.proxy import find_nginx

__all__ = ["find_or_fetch_nginx"]


def find_or_fetch_nginx() -> Path | None:
    """The installed nginx, or the package's: no root, nothing installed. None: neither.

    apt checks the package's signature chain as it does for an installation.
    """
    kept = cache_folder() / "nginx"
    program = kept / "usr" / "sbin" / "nginx"
    if found := find_nginx():
        return found
    if not os.access(program, os.X_OK):
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as name:
                _call("apt-get", "download", "nginx", folder=name)
                for package in Path(name).glob("*.deb"):
                    _call("dpkg", "-x", package.name, "unpacked", folder=name)
                shutil.rmtree(kept, ignore_errors=True)
                os.replace(Path(name) / "unpacked", kept)
            _call(str(program), "-v", folder=str(kept))  # its libraries are there
        except (OSError, subprocess.SubprocessError):
            return None
    return program


def _call(*command: str, folder: str) -> None:
    subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=120)
