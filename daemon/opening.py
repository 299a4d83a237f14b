"""What a daemon begins with: the run if it is known here, and what earlier lives of it have left."""

from __future__ import annotations

import contextlib

from pydantic import ValidationError

from ..errors import PeerError, UsageError
from ..keys import device_id
from ..run import DeviceId, JoinCode, RunSpec
from .addresses import PeerAddress
from .events import Event
from .options import DaemonOptions
from .p2pd import check_port_is_free
from .store import RunStore, Store


def open_run(options: DaemonOptions, store: Store) -> tuple[JoinCode, RunStore | None]:
    """The join code, and the run if this device knows it already.

    Raises:
        UsageError: the options name no run.
        StorageError: the state folder refused.
    """
    if options.mode == "new":
        if options.spec is None or options.secret_hex is None:
            raise UsageError("a new run needs a spec and a secret")
        spec = options.spec.encode()
        secret = bytes.fromhex(options.secret_hex)
        return JoinCode.create(secret, RunSpec.decode(spec).run_id), store.create_run(spec, secret)
    if options.code is None:
        if store.current is None:
            raise UsageError(
                "this device takes part in no run yet", "join one with `p2pcollab join --code P2P-…`"
            )
        known = store.open_run(store.current)
        return JoinCode.create(known.secret, known.run_id), known
    code = JoinCode.parse(options.code)
    for run_id in store.runs():
        if run_id.startswith(code.run_prefix):
            known = store.open_run(run_id, code.secret)
            if code.secret in known.rotation.retired:
                # What this device has is newer.
                return JoinCode.create(known.secret, known.run_id), known
            if known.secret != code.secret:
                # The secret may have changed while this device was away: the others will say.
                known.try_secret(code.secret)
            return code, known
    return code, None


def remembered(options: DaemonOptions, run_store: RunStore | None) -> DaemonOptions:
    """The options, with what was given when this device first joined where nothing is given now."""
    saved = run_store.meta().get("options") if run_store is not None else None
    if not isinstance(saved, dict):
        return options
    given = options.model_dump(mode="json")
    defaults = DaemonOptions(mode=options.mode, state=options.state).model_dump(mode="json")
    kept = {name: saved[name] for name, value in given.items() if name in saved and value == defaults[name]}
    try:
        return DaemonOptions.model_validate({**given, **kept})
    except ValidationError:
        return options  # of another version


def earlier_events(run_store: RunStore | None) -> list[Event]:
    """What happened before this life of the daemon, oldest first."""
    if run_store is None:
        return []
    return [
        Event(id=id, time=at, kind=kind, text=text, fields=fields)
        for id, at, kind, text, fields in run_store.events()
    ]


def saved_addresses(run_store: RunStore | None) -> list[PeerAddress]:
    """Where the others were the last time."""
    saved = run_store.meta().get("addresses") if run_store is not None else None
    addresses = []
    for text in saved if isinstance(saved, list) else ():
        with contextlib.suppress(PeerError):
            addresses.append(PeerAddress.parse(str(text)))
    return addresses


def saved_members(run_store: RunStore) -> list[bytes]:
    """Public keys of the devices that have proved to be in the run."""
    saved = run_store.meta().get("members")
    keys = []
    for device, fields in saved.items() if isinstance(saved, dict) else ():
        with contextlib.suppress(ValueError):
            key = bytes.fromhex(str(fields.get("key"))) if isinstance(fields, dict) else b""
            if device_id(key) == device:
                keys.append(key)
    return keys


def saved_names(run_store: RunStore) -> dict[DeviceId, str]:
    """What these devices were called."""
    saved = run_store.meta().get("members")
    return {
        DeviceId(device): str(fields["name"])
        for device, fields in (saved.items() if isinstance(saved, dict) else ())
        if isinstance(fields, dict) and fields.get("name")
    }


def saved_port(run_store: RunStore | None, host: str) -> int:
    """The port of last time, so that the others find this device where they remember it; 0 if it is taken."""
    saved = run_store.meta().get("port") if run_store is not None else None
    if isinstance(saved, int):
        with contextlib.suppress(UsageError):
            check_port_is_free(host, saved)
            return saved
    return 0
