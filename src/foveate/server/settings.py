"""How a server runs, beside its model and its scheduler."""

from dataclasses import dataclass, field

from foveate.core.errors import FoveateError
from foveate.server.keys import Keys
from foveate.server.limits import Limits
from foveate.server.moderation import Check
from foveate.server.store import StoreSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServerSettings:
    """How a server runs.

    Attributes:
        keys: Who may come.
        limits: How much one request may ask for.
        store: How much is kept behind urls.
        moderation: The operator's check of prompts and images.
        origins: Web pages of other origins that browsers let in (CORS); none by default.
        aliases: Names that requests may call the model by, beside its own.
        model_flags: What `foveate generate` needs to load the same model.
        keeps_on_disconnect: Whether the images of a client that went away are finished into the store.
        encoders: Threads that encode images.
        shows_prompts: Whether prompts are logged.
    """

    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    store: StoreSettings = field(default_factory=StoreSettings)
    moderation: Check | None = None
    origins: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    model_flags: tuple[str, ...] = ()
    keeps_on_disconnect: bool = False
    encoders: int = 2
    shows_prompts: bool = False

    def __post_init__(self) -> None:
        """Refuses a server that could encode nothing."""
        if self.encoders < 1:
            raise FoveateError(f"encoders must be 1 or more, got {self.encoders}")
