"""`image`: build the runtime image and push it."""

from __future__ import annotations

from pulse_railway import runtime_image
from pulse_railway.options import ImageOptions
from pulse_railway.output import Output
from pulse_railway.railway import docker, program


def image(wanted: ImageOptions, output: Output) -> str:
    """Returns the reference of the image that was pushed. Raises Failure."""
    program.need("docker")
    tag = wanted.tag or runtime_image.runtime_version().replace("+", "-")
    reference = f"{wanted.repository}:{tag}"
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
