"""`privet client`: a person's own device, from `init` to `forget`.

Heavy imports wait inside the functions: no command here loads torch, and `status` loads no
accountant either. Nothing printed quotes a record.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...common.errors import ConfigError, DataError, StateError
from . import feedback, printing
from .options import AsJson, HomeFolder, PassphraseFile, opened

if TYPE_CHECKING:
    from ..consent.run_offers import Offer
    from ..import_texts.watched_folders import Held
    from ..store.device_store import DeviceStore
    from ..store.erase import Erased
    from .printing import OfferFacts

__all__ = ["app"]

app = typer.Typer(help="This device: what it gives, and what it allows.", no_args_is_help=True)
app.add_typer(feedback.app, name="feedback")

_All = Annotated[bool, typer.Option("--all", help="Every line, however many.")]


# --- the home ------------------------------------------------------------------------------------


@app.command("init")
def init(
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    name: Annotated[str, typer.Option(help="A label for the operator; free text.")] = "",
    keyring: Annotated[
        bool, typer.Option("--keyring", help="Open with the OS keyring, without a passphrase.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make this device's home: identities, vault, policy.toml with safe limits."""
    from ..enrolled.access import folder_of, from_environment, new_unlock
    from ..store.device_store import DeviceStore
    from ..store.key_file import KEY_FILE
    from ..store.vault import FILE

    folder = folder_of(home)
    if any(os.path.lexists(folder / name) for name in (FILE, KEY_FILE)):
        raise StateError(
            f"there is a home in {folder} already, which was left as it is; `privet client status` "
            "looks at it, --home names another"
        )
    file = passphrase or (None if keyring else from_environment())
    with DeviceStore.create(folder, new_unlock(file, keyring, "New passphrase"), name) as store:
        card = store.card
    if as_json:
        printing.dump({"home": str(folder), "card": json.loads(card)})
        return
    print(f"{folder} is this device's home; policy.toml in it says what privet may do.\n")
    print(f"Its card, for the operator of a server (public):\n{card}\n")
    print("Next: privet client add PATH...      your own texts, which stay here")
    print("      privet client join --server HOST:PORT --ca FILE")
    print("      privet client start")
    if not keyring:
        print("\nKeep the passphrase: nobody can open the home without it.")


@app.command("card")
def card(
    home: HomeFolder = None, passphrase: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """Print the card again: one line of JSON for a server's operator, nothing secret."""
    with opened(home, passphrase) as store:
        printing.say(as_json, json.loads(store.card), store.card)


@app.command("policy")
def policy(
    home: HomeFolder = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether it can be used.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say where policy.toml is, and which limits are in force."""
    from ..consent import policy as policies
    from ..enrolled.access import folder_of
    from ..store.device_store import POLICY

    path = folder_of(home) / POLICY
    limits = policies.read(path)
    values = limits.model_dump(mode="json")
    warnings = limits.warnings()
    if as_json:
        printing.dump({"path": str(path), "limits": values, "warnings": warnings})
        return
    print(path if not check else f"{path} can be used")
    if not check:
        rows = [(f"{s}.{key}", json.dumps(v)) for s in values for key, v in values[s].items()]
        printing.table(("limit", "value"), rows)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


@app.command("passphrase")
def passphrase(
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    new_file: Annotated[
        Path | None, typer.Option("--new-file", metavar="FILE", help="Of the new passphrase.")
    ] = None,
    keyring: Annotated[
        bool, typer.Option("--keyring", help="Open with the OS keyring from now on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Change how the home is opened, and nothing else in it."""
    from ..enrolled.access import folder_of, new_unlock, unlock_of
    from ..store.device_store import DeviceStore
    from ..store.vault import rewrap, unlock_kind

    folder = folder_of(home)
    old = unlock_of(folder, passphrase)
    DeviceStore.open(folder, old).close()  # a wrong one is said before the new one is asked for
    rewrap(folder, old, new_unlock(new_file, keyring, "New passphrase"))
    kind = unlock_kind(folder)
    printing.say(
        as_json, {"home": str(folder), "opens_by": kind}, f"{folder} is opened by a {kind} now."
    )


@app.command("forget")
def forget(
    home: HomeFolder = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase everything of this device, the key first, and prove it. Nothing brings it back."""
    from dataclasses import asdict

    from ..enrolled.access import folder_of
    from ..store.erase import exclusive
    from .device_status import worker

    folder = folder_of(home)
    if worker(folder) is not None:
        with exclusive(folder):  # says who has it
            pass
    if not yes:
        _confirm(
            f"Everything in {folder} is erased: records, heads, keys, and the ledger of what "
            "was spent. Type FORGET to go on",
            "FORGET",
        )
    erased = _erase(folder)
    printing.say(as_json, {**asdict(erased), "folder_removed": not folder.exists()}, str(erased))
    if not as_json and not folder.exists():
        print(f"{folder} is gone.")


def _erase(folder: Path) -> "Erased":
    """Erase the vault with its proof, then the policy, then the folder if nothing else is in it."""
    from contextlib import suppress
    from dataclasses import replace

    from ..store.device_store import POLICY
    from ..store.erase import destroy

    erased = destroy(folder)
    path = folder / POLICY
    if POLICY in erased.kept and path.is_file() and not path.is_symlink():
        size = path.stat().st_size
        path.unlink()
        kept = tuple(name for name in erased.kept if name != POLICY)
        erased = replace(erased, removed=(*erased.removed, (POLICY, size)), kept=kept)
    with suppress(OSError):
        folder.rmdir()
    return erased


def _confirm(question: str, word: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nothing was erased: there is no terminal to confirm it at; add --yes")
    if typer.prompt(question, err=True) != word:
        raise ConfigError(f"nothing was erased: {word} was not typed")


# --- own records ---------------------------------------------------------------------------------


@app.command("add")
def add(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="Files or folders; none: look again."),
    ] = None,
    me: Annotated[
        list[str] | None,
        typer.Option("--me", metavar="NAME", help="You, as in chats and mails; repeatable."),
    ] = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    every: _All = False,
    as_json: AsJson = False,
) -> None:
    """Take your own texts into the vault, and watch their folders for new ones."""
    from ..import_texts import watched_folders
    from ..import_texts.scan import key_of

    roots = [Path(os.path.abspath(path.expanduser())) for path in paths or ()]
    for root in roots:
        if not os.path.lexists(root):
            raise DataError(f"there is no {key_of(root)}: name a file or a folder that is there")
    with opened(home, passphrase) as store, printing.progress() as step:
        before = watched_folders.read(store)
        if not before.roots and not roots:
            raise DataError("nothing is watched yet: name files or folders, add PATH...")
        scanned = watched_folders.rescan(
            store,
            roots=[*before.roots, *map(key_of, roots)],
            me=[*before.me, *(me or ())],
            progress=step,
        )
    printing.scan(scanned, every, as_json)


@app.command("sources")
def sources_(
    remove: Annotated[
        Path | None, typer.Option("--remove", metavar="PATH", help="Watch it no more.")
    ] = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List what is watched, or with --remove forget a source and all its records."""
    from ..import_texts import watched_folders
    from ..import_texts.scan import key_of

    with opened(home, passphrase) as store:
        held = watched_folders.read(store)
        if remove is not None:
            key = key_of(Path(os.path.abspath(remove.expanduser())))
            if key not in held.roots:
                known = ", ".join(held.roots) or "nothing"
                raise DataError(f"{key} is not watched: {known} is")
            with printing.progress() as step:
                rest = [root for root in held.roots if root != key]
                watched_folders.rescan(store, roots=rest, progress=step)
            held = watched_folders.read(store)
    counts = {root: _below(root, held.files) for root in held.roots}
    if as_json:
        printing.dump({"sources": counts, "records": held.records, "me": held.me})
        return
    printing.table(("source", "records"), counts.items())
    print(f"{held.records:,} records in all")


def _below(root: str, files: Mapping[str, "Held"]) -> int:
    """Count the records of the files in a source.

    A file in two sources counts in both.
    """
    from ..import_texts.scan import key_of, path_of

    real = key_of(Path(os.path.realpath(path_of(root))))
    return sum(
        held.records
        for key, held in files.items()
        if key == real or key.startswith(real.rstrip("/") + "/")
    )


# --- the server ----------------------------------------------------------------------------------


@app.command("join")
def join(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Of the operator.")],
    ca: Annotated[
        Path | None, typer.Option("--ca", metavar="FILE", help="The operator's certificate, PEM.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            metavar="FILE",
            help="The devices there are; no others. Default: `directory` beside the certificate.",
        ),
    ] = None,
    directory_key: Annotated[
        str | None,
        typer.Option(
            "--directory-key",
            metavar="KEY",
            help="Whose signature it needs; 64 hex digits or FILE.",
        ),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Without one: any device the server shows may exist.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure-test", help="Without TLS, on this machine only: a test.")
    ] = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Belong to a server. Nothing is sent before you agree to one of its runs."""
    from ..enrolled import join as joining

    with opened(home, passphrase) as store:
        asked = joining.Asked(server, ca, directory, insecure, directory_key, open_)
        lines = joining.join(store, asked)
        closed = store.joined is not None and store.joined.closed
    facts = {"server": server, "insecure": insecure, "closed": closed, "said": lines}
    printing.say(as_json, facts, "\n".join([*lines, "Next: privet client start"]))


@app.command("directory")
def directory(
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write what is held there.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="FILE", help="Another device's export.")
    ] = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the signed list of devices that this one holds, and how it changed since it joined."""
    from ...common.secure_aggregation import fleet_directory as directories
    from ..enrolled import pinned_directory

    with opened(home, passphrase) as store:
        chain, facts = store.chain, pinned_directory.facts(store)
        if chain is None or facts is None or not chain.signature:
            raise StateError(
                "this device holds no signed directory: join with one (`privet client join "
                "--directory FILE`)"
            )
        lines = pinned_directory.history(store)
        if export is not None:
            directories.write(export, chain)
        same = None if compare is None else pinned_directory.compared(store, compare)
    if as_json:
        printing.dump({**facts, "history": lines, "compared": same})
        return
    printing.directory(facts, lines)
    if same is not None:
        print(same)


@app.command("leave")
def leave(
    home: HomeFolder = None, passphrase: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """Belong to no server any more, but keep records, heads and the ledger."""
    from .device_status import worker

    with opened(home, passphrase) as store:
        joined = store.joined
        if joined is None:
            raise StateError("this device has joined no server: there is none to leave")
        store.leave()
        running = worker(store.folder)
    sentence = f"This device has left {joined.server} and answers none of its runs any more."
    if running is not None:
        sentence += f" Stop `privet client start` too (its worker is process {running})."
    printing.say(as_json, {"left": joined.server, "worker": running}, sentence)


@app.command("runs")
def runs(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="One of them, in full; its beginning will do."),
    ] = None,
    agree: Annotated[bool, typer.Option("--agree", help="Take part in it.")] = False,
    partly: Annotated[
        bool, typer.Option("--partly", help="With --agree: in as many rounds as are paid for.")
    ] = False,
    decline: Annotated[bool, typer.Option("--decline", help="Take no part in it.")] = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the runs that the server offers, none of which is answered before you agree."""
    from . import device_status as status

    if agree and decline:
        raise ConfigError("--agree and --decline were given: choose one of them")
    if partly and not agree:
        raise ConfigError("--partly goes with --agree: privet client runs RUN --agree --partly")
    if run is None and (agree or decline):
        raise ConfigError("name the run: privet client runs RUN --agree")
    with opened(home, passphrase) as store:
        if run is not None:
            _decide(store, _offer(store, run), agree, partly, decline, as_json)
            return
        printing.runs(status.runs(store), as_json)
        if not as_json and store.directory_refused:
            print(store.directory_refused)


def _offer(store: "DeviceStore", run: str) -> "Offer":
    from ..consent.run_offers import by_beginning

    offers = {offer.run: offer for offer, _ in store.runs()}
    matching = by_beginning(run, [*offers])
    if len(matching) != 1:
        names = ", ".join(matching or offers) or "none was offered yet"
        what = "more than one run begins with" if matching else "there is no run"
        raise StateError(f"{what} {run!r}: {names}")
    return offers[matching[0]]


def _decide(
    store: "DeviceStore", offer: "Offer", agree: bool, partly: bool, decline: bool, as_json: bool
) -> None:
    """Show one run in full, then record what the owner said."""
    from .device_status import runs

    facts = _offer_facts(store, offer)
    if not as_json:
        printing.offer(facts)
    if agree:
        store.agree(offer, "owner", partly)
    if decline:
        store.withdraw(offer)
    state = next(run for run in runs(store) if run["run"] == offer.run)
    sentence = _STATES[state["state"]].format(run=offer.run)
    printing.say(as_json, {**state, **facts, "digest": offer.digest}, sentence)


def _offer_facts(store: "DeviceStore", offer: "Offer") -> "OfferFacts":
    """Return what a run asks for, what was changed in it since, and the rounds left out."""
    from ..consent.offer_description import describe
    from ..consent.run_offers import changes
    from ..store.device_store import ME

    rows = describe(offer, store.policy, store.state_for(offer.run))
    before = store.agreed(offer.run)
    declined = [round for round in store.ledger.declined(ME) if round.run == offer.run]
    return {
        "asks": [*rows, *_own_part(store, offer)],
        "changed": [] if before is None else changes(before[0], offer),
        "declined_rounds": [(round.round, round.reason) for round in declined],
    }


def _own_part(store: "DeviceStore", offer: "Offer") -> "list[tuple[str, str]]":
    """Describe this device's part in an A/B experiment.

    That is its arm, what the device lacks for it, and the outcome so far.

    It is the owner's own device: nothing on it is hidden from them, though knowing an arm may sway.
    """
    from ...common.errors import PrivacyError
    from ..assistant import template_store
    from ..enrolled import ab_assignment

    mine = ab_assignment.of(store, offer)
    if mine is None:
        return []
    value = ab_assignment.outcome(store, offer.run, mine.settings)
    rows = [
        ("your arm", mine.arm),
        ("your outcome", "none yet" if value is None else f"{value:.3g}, on this device"),
    ]
    if mine.template is not None:
        try:
            template_store.trusted(store, *mine.template)
        except (ConfigError, PrivacyError) as lacking:
            rows.append(("your arm", f"not in use, and its outcome stays empty: {lacking}"))
    return rows


_STATES = {
    "agreed": "Agreed: this device takes part in {run}.",
    "declined": "Declined: this device takes no part in {run}.",
    "changed": "It was changed after you agreed, so this device takes no part in {run}: "
    "decide with --agree or --decline.",
    "waits": "This device takes no part in {run} yet: decide with --agree or --decline.",
}


@app.command("pause")
def pause(
    off: Annotated[bool, typer.Option("--off", help="Take part again.")] = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Take part in no new round until `pause --off`, but finish one that has begun."""
    with opened(home, passphrase) as store:
        store.pause(not off)
    sentence = "This device takes part again." if off else "This device takes part in no new round."
    printing.say(as_json, {"paused": not off}, sentence)


# --- what happened -------------------------------------------------------------------------------


@app.command("status")
def status(
    home: HomeFolder = None, passphrase: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """Show how this device is."""
    from . import device_status as statuses

    with opened(home, passphrase) as store:
        facts = statuses.facts(store)
    printing.status(facts, as_json)


@app.command("budget")
def budget(
    home: HomeFolder = None, passphrase: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """Show what this home has spent of its privacy budget, and against whom it holds.

    A budget is one home's: another device, or a home begun after `forget`, has its own.
    """
    from ..privacy.spending import spending

    with opened(home, passphrase) as store:
        facts = spending(store)
    printing.budget(facts, as_json)


@app.command("outbox")
def outbox(
    seq: Annotated[int | None, typer.Argument(metavar="NUMBER", help="One, in full.")] = None,
    payload: Annotated[
        Path | None, typer.Option("--payload", metavar="FILE", help="Write its bytes there.")
    ] = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List every byte-string that has left this device: when, to whom, under which release."""
    from . import device_status as statuses

    if payload is not None and seq is None:
        raise ConfigError("--payload writes one byte-string: name its number")
    with opened(home, passphrase) as store:
        if seq is None:
            printing.outbox(statuses.outbox(store), as_json)
            return
        sent, row = statuses.release_of(store, seq)
        if payload is not None:
            _write_payload(store, seq, payload)
    printing.sent(sent, row, payload, as_json)


def _write_payload(store: "DeviceStore", seq: int, path: Path) -> None:
    from ...common.files import explain_os_errors

    content = store.payload(seq)
    if content is None:
        raise StateError(
            f"the bytes of number {seq} made room for newer ones (outbox.keep_mb in policy.toml); "
            "its size and SHA-256 are kept"
        )
    if path.exists():
        raise StateError(f"{path} is there already, and was left as it is: name another file")
    with explain_os_errors(path, "write"), open(path, "xb") as file:
        file.write(content)


# --- taking part ---------------------------------------------------------------------------------


@app.command("start")
def start(
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Between SuperNode and worker; else a free one."),
    ] = None,
) -> None:
    """Take part: SuperNode and worker, started again when they end, until Ctrl-C."""
    from ..enrolled.access import folder_of
    from ..runtime import processes as run

    run.start(folder_of(home), passphrase, port, printing.line)


@app.command("work", hidden=True)
def work(
    port: Annotated[int, typer.Option(min=1, max=65535)],
    secret: Annotated[Path, typer.Option("--secret-file")],
    server: Annotated[str, typer.Option()],
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
) -> None:
    """Run the worker behind the SuperNode on `port` (used by `start`)."""
    from ..enrolled.access import folder_of
    from ..runtime import processes as run

    run.work(folder_of(home), passphrase, port, secret, server, printing.line)


@app.command("service")
def service(home: HomeFolder = None, passphrase: PassphraseFile = None) -> None:
    """Print a systemd unit that runs `privet client start` for good."""
    import shutil

    from ..enrolled.access import folder_of
    from ..runtime.supervisor import unit_text
    from ..store.vault import unlock_kind

    folder = folder_of(home)
    if unlock_kind(folder) == "passphrase" and passphrase is None:
        raise ConfigError(
            "a service cannot be asked for a passphrase: put it into a file that only you can "
            "read and give --passphrase-file FILE, or change to the keyring "
            "(privet client passphrase --keyring)"
        )
    beside = Path(sys.executable).parent / "privet"
    program = beside if beside.is_file() else Path(shutil.which("privet") or beside)
    file = None if passphrase is None else Path(os.path.abspath(passphrase))
    print(unit_text(folder, program, passphrase=file), end="")
