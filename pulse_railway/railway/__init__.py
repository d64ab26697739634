"""Access to Railway: its API, its tokens, its CLI; and docker."""
