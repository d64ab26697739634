"""Where 0.3.x had it, and apps import it from."""

from pulse_railway.app.plugin import RailwayPlugin as RailwayPlugin
from pulse_railway.app.plugin import RailwayPluginError as RailwayPluginError
