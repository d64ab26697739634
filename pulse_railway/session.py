"""Where 0.3.x had it, and apps import it from."""

from pulse_railway.app.session import RailwayRedisSessionStore as RailwayRedisSessionStore
from pulse_railway.app.session import RailwaySessionStore as RailwaySessionStore
