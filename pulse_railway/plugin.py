"""0.3.x's module of `RailwayPlugin`, for apps that import it from here."""

from pulse_railway.app.plugin import RailwayPlugin as RailwayPlugin
from pulse_railway.app.plugin import RailwayPluginError as RailwayPluginError
