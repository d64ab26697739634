"""SSH keys: makes the local Railway's own, and computes the fingerprints of others."""

from __future__ import annotations

from pathlib import Path

import asyncssh


def key_file(path: Path) -> Path:
    """Return `path`, with an Ed25519 key pair made in it and in `path`.pub if it is missing."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = asyncssh.generate_private_key("ssh-ed25519", comment="local-railway")
        key.write_private_key(str(path))
        path.chmod(0o600)
        key.write_public_key(str(path.with_suffix(".pub")))
    return path


def fingerprint(public_key: str) -> str:
    """Return SHA256:... of a public key in OpenSSH's format. Raises ValueError for other text."""
    try:
        return asyncssh.import_public_key(public_key).get_fingerprint()
    except asyncssh.KeyImportError as error:
        raise ValueError(str(error)) from None
