"""A Railway on this machine: its API, its builds, its edge, its cron, with real processes.

    state.py        what exists, kept in one JSON file
    api/            the GraphQL API over it (schema.graphql is the served part of Railway's)
    supervisor.py   services as processes: builds, health checks, restarts, cron
    volumes.py      a folder for each service in each environment
    edge.py         a TLS address per domain
    server.py       the whole, with uploads, ssh, OAuth and faults to order
    cli.py          the `railway` command that stands in for Railway's
    site/           what a service's Python gets: the private network's names

Nothing of pulse_railway imports it but `invoke local` and the tests.
"""
