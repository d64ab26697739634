"""What `deploy` and `doctor` check of a build before there is one: its files, and no secrets."""

from __future__ import annotations

from pathlib import Path

from pulse_railway import contract
from pulse_railway.build_context import file_sources, missing_sources, secrets_in_image
from pulse_railway.errors import Failure
from pulse_railway.options import DeployOptions
from pulse_railway.railway import upload


def build_arguments(options: DeployOptions, web_root: Path, address: str) -> dict[str, str]:
    """Return the arguments of the image's build."""
    return {
        contract.APP_FILE: options.app.file,
        contract.WEB_ROOT: web_root.as_posix(),
        contract.SERVER_ADDRESS: address,
        **options.build_args,
    }


def check_build(options: DeployOptions, dockerfile: Path, web_root: Path) -> None:
    """Raise Failure if the image would hold secrets, or the build lacks a file.

    Args:
        dockerfile, web_root: relative to the context.
    """
    context = options.app.context
    variables = build_arguments(options, web_root, options.server_address or "https://x.invalid")
    if options.image_repository:
        if secret_files := secrets_in_image(context, context / dockerfile):
            raise Failure(
                f"the image would hold {', '.join(secret_files)}: name them in"
                f" {context / '.dockerignore'}, or copy less in {dockerfile}"
            )
    else:
        check_upload(options, dockerfile, web_root)
    if missing := missing_sources(context, context / dockerfile, variables):
        raise Failure(
            f"the build would fail: {dockerfile} copies {', '.join(missing)}, and"
            f" {context} has no such file, or .dockerignore leaves it out"
        )
    if options.image_repository:
        return
    for path in file_sources(context / dockerfile, variables):
        if reason := upload.left_out(context, Path(path), gitignore=not options.no_gitignore):
            raise Failure(
                f"the build would fail: {dockerfile} copies {path}, which would not be uploaded:"
                f" {reason}"
            )


def check_upload(options: DeployOptions, dockerfile: Path, web_root: Path) -> None:
    """Raise Failure if the upload lacks what the build needs, or holds secrets."""
    context, gitignore = options.app.context, not options.no_gitignore
    app = Path(options.app.file.partition(":")[0])
    for label, path in (("Dockerfile", dockerfile), ("app", app), ("web root", web_root)):
        if reason := upload.left_out(context, path, gitignore=gitignore):
            raise Failure(f"the {label} {path} would not be uploaded: {reason}")
    if files := upload.secrets_in_upload(context, gitignore=gitignore):
        raise Failure(
            f"the upload would hold {', '.join(files[:5])}{' and more' if len(files) > 5 else ''}:"
            f" name them in {context / '.railwayignore'}"
        )
