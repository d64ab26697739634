"""`maintenance on|off`: answer all requests with a maintenance page, or with the app again."""

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
    api: Api, stack: Stack, options: MaintenanceOptions, output: Output
) -> dict[str, Any]:
    """Switch maintenance on or off.

    The router's variables store the change, too: a closed site stays closed if Redis loses its
    data.
    """
    assert stack.router is not None
    with output.step(f"switch it {'on' if options.on else 'off'}"):
        closed, opened = router_commands.send_maintenance(
            api,
            stack,
            options.on,
            options.page,
            options.retry_after,
            options.message,
            output.warn,
        )
        times = {contract.MAINTENANCE: closed, contract.MAINTENANCE_OFF: opened}
        values = {name: repr(at) if at else "" for name, at in times.items()}
        try:
            write_variables(api, stack.target, stack.router.id, values)
        except Failure as failure:
            output.warn(f"{contract.MAINTENANCE} could not be written: {failure}; the janitor will")
    return {"maintenance": options.on, "address": stack.address}
