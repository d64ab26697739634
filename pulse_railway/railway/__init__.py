"""Everything that talks to Railway: its API, its tokens, its CLI, and docker."""
