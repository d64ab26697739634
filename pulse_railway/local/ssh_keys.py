"""SSH keys: those that the local Railway makes, and the fingerprints by which it knows others."""

from __future__ import annotations

from pathlib import Path

import asyncssh


def key_file(path: Path) -> Path:
    """An Ed25519 key pair, made where it is not there yet."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = asyncssh.generate_private_key("ssh-ed25519", comment="local-railway")
        key.write_private_key(str(path))
        path.chmod(0o600)
        key.write_public_key(str(path.with_suffix(".pub")))
    return path


def fingerprint(public_key: str) -> str:
    """SHA256:... of a public key in OpenSSH's format. Raises ValueError for anything else."""
    try:
        return asyncssh.import_public_key(public_key).get_fingerprint()
    except asyncssh.KeyImportError as error:
        raise ValueError(str(error)) from None
