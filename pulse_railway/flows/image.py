"""`image`: build the runtime image and push it."""

from __future__ import annotations

from pulse_railway import runtime_image
from pulse_railway.options import ImageOptions
from pulse_railway.output import Output
from pulse_railway.railway import docker


def image(options: ImageOptions, output: Output) -> str:
    """Build and push the image, and return its reference. Raises Failure."""
    docker.need_buildx()
    tag = options.tag or runtime_image.runtime_version().replace("+", "-")
    reference = f"{options.repository}:{tag}"
    folder = runtime_image.sources()
    with output.step(f"build and push {reference}"):
        docker.build(
            image=reference,
            dockerfile=folder / "Dockerfile.router",
            context=folder,
            build_args={},
            on_line=output.log,
        )
    return reference
