"""A Railway on this machine: its API, its builds, its edge, its cron, with real processes.

    state.py        what exists, kept in one JSON file
    api/            the GraphQL API over it (schema.graphql is the served part of Railway's)
    supervisor.py   services as processes: builds, health checks, restarts, cron
    volumes.py      a folder for each service in each environment
    edge.py         a TLS address per domain
    relay.py        ssh into a service; ssh_keys.py makes and reads its keys
    faults.py       what is to go wrong
    page.py         the page for a browser (page.html)
    server.py       the whole, with uploads and OAuth
    cli.py          the `railway` command that stands in for Railway's
    placeholder.py  what answers in place of React where it is not built
    site/           what a service's Python gets: the private network's names

Nothing of pulse_railway imports it but `invoke local` and the tests.
"""
