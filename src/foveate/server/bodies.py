"""Bodies of requests that do not stream; encoding takes long, so they are made in worker threads."""

import secrets
import time
from collections.abc import Sequence

from foveate.server import replies
from foveate.server.admission import Asked
from foveate.server.exchange import Exchange, media_type
from foveate.server.reproduce import Origin
from foveate.server.schemas import CallInfo, CompareReply, ImageData, ImageRequest, ImagesReply, PolicyInfo, SideReply
from foveate.server.service import Service
from foveate.server.store import Store, StoreFullError


def images_body(exchange: Exchange, service: Service, origin: Origin) -> str:
    """OpenAI's body; called in a thread."""
    (side,) = exchange.sides
    asked, body = side.asked, side.asked.body
    assert isinstance(body, ImageRequest), "of generations"
    made = [side.made(side.done[index], origin) for index in sorted(side.done)]
    files = [replies.file_of(asked, one.event) for one in made]
    if body.response_format == "url":
        names = _kept(asked, files, service.store)
        data = [ImageData(url=f"{origin.base_url.rstrip('/')}/v1/images/{name}") for name in names]
    else:
        data = [ImageData(b64_json=replies.as_base64(content)) for content in files]
    reply = ImagesReply(
        created=int(time.time()),
        data=data,
        output_format=asked.encoder.format,  # type: ignore[arg-type]  # it came from that field
        quality=asked.quality,
        size=asked.size,
        usage=replies.total_usage(made),
        foveate=CallInfo(
            id=exchange.id,
            model=asked.model,
            policy=PolicyInfo(spec=asked.job.policy.spec, fingerprint=asked.job.policy.fingerprint),
            warnings=replies.all_warnings(made),
            images=[one.info for one in made],
        ),
    )
    return reply.model_dump_json(
        exclude={"data": {"__all__": {"b64_json" if body.response_format == "url" else "url"}}}
    )


def _kept(asked: Asked, files: Sequence[bytes], store: Store) -> list[str]:
    """Keeps files, and says their names, which nobody can guess: a request's id may be its client's, so they are none.

    Raises:
        StoreFullError: Not all of them can be kept at once.
    """
    owner, names = asked.work.key, [secrets.token_urlsafe(18) for _ in files]
    for name, content in zip(names, files, strict=True):
        store.put(owner, name, content, media_type(asked))
    if not all(store.holds(owner, name) for name in names):
        raise StoreFullError(f"{len(files)} images do not fit into the store together; ask for fewer, or b64_json")
    return names


def compare_body(exchange: Exchange, _service: Service, origin: Origin) -> str:
    """The body of a comparison; called in a thread."""
    made = [side.made(side.done[0], origin) for side in exchange.sides]
    a, b = (
        SideReply(
            b64_json=replies.as_base64(replies.file_of(side.asked, one.event)),
            foveate=one.info,
        )
        for side, one in zip(exchange.sides, made, strict=True)
    )
    asked = exchange.sides[0].asked
    reply = CompareReply(
        created=int(time.time()),
        id=exchange.id,
        model=asked.model,
        seed=asked.job.seeds[0],
        output_format=asked.encoder.format,  # type: ignore[arg-type]  # it came from that field
        size=asked.size,
        a=a,
        b=b,
        fidelity=replies.fidelity_of(made[0], made[1]),
    )
    return reply.model_dump_json()
