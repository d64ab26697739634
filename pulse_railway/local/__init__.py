"""A Railway on this machine: its API, its builds, its edge, its cron, with real processes.

    state.py        what exists, stored in one JSON file
    guard.py        the folder for its owner alone, the key of /local/*, other websites
    uploads.py      unpacks uploads, and refuses hostile ones
    api/            the GraphQL API over it (schema.graphql is the served part of Railway's)
    supervisor.py   services as processes: builds, health checks, restarts, cron
    volumes.py      a folder for each service in each environment
    edge.py         a TLS address per domain
    relay.py        ssh into a service; ssh_keys.py makes and reads its keys
    faults.py       faults and delays that tests ask for
    page.py         the page for a browser (page.html)
    server.py       the server of all of these, with uploads and OAuth
    cli.py          the `railway` command, in place of Railway's
    placeholder.py  answers in place of React's server where React is not built
    site/           imported by a service's Python: resolves the private network's names

Only `invoke local` and the tests import this package.
"""
