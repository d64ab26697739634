"""0.3.x's module of the session store, for apps that import it from here."""

from pulse_railway.app.session import RailwayRedisSessionStore as RailwayRedisSessionStore
from pulse_railway.app.session import RailwaySessionStore as RailwaySessionStore
