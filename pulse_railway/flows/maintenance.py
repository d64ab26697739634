"""`maintenance on|off`: answer everybody with a page, or with the app again."""

from __future__ import annotations

from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.errors import Failure
from pulse_railway.options import MaintenanceOptions
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.services import write_variables
from pulse_railway.stack import Stack


def maintenance(
    api: Api, stack: Stack, wanted: MaintenanceOptions, output: Output
) -> dict[str, Any]:
    """Switch it on or off, and note that on Railway, where Redis cannot lose it: a site that was
    closed stays closed."""
    assert stack.router is not None
    with output.step(f"switch it {'on' if wanted.on else 'off'}"):
        closed, opened = router_commands.send_maintenance(
            api,
            stack,
            wanted.on,
            wanted.page,
            wanted.retry_after,
            wanted.message,
            output.warn,
        )
        times = {contract.MAINTENANCE: closed, contract.MAINTENANCE_OFF: opened}
        values = {name: repr(at) if at else "" for name, at in times.items()}
        try:
            write_variables(api, stack.target, stack.router.id, values)
        except Failure as failure:
            output.warn(f"{contract.MAINTENANCE} could not be written: {failure}; the janitor will")
    return {"maintenance": wanted.on, "address": stack.address}
