"""How a server runs, beside its model and its scheduler."""

from dataclasses import dataclass, field

from foveate.core.errors import FoveateError
from foveate.server.hosts import allowed_name
from foveate.server.keys import Keys
from foveate.server.limits import Limits
from foveate.server.moderation import Check, TimedCheck
from foveate.server.store import StoreSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServerSettings:
    """How a server runs.

    Attributes:
        keys: Who may come.
        limits: How much one request may ask for.
        store: How much is kept behind urls.
        moderation: The operator's check of prompts and images; held as a `TimedCheck`.
        moderation_seconds: What one call of it may take.
        origins: Web pages of other origins that browsers let in (CORS); none by default.
        hosts: Names that the header Host may have, with any port; None for any.
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
    moderation_seconds: float = 30.0
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    model_flags: tuple[str, ...] = ()
    keeps_on_disconnect: bool = False
    encoders: int = 2
    shows_prompts: bool = False

    def __post_init__(self) -> None:
        """Refuses a server that could encode nothing, completes the names of hosts, and gives the check its time.

        Raises:
            FoveateError: A number or a name is none that can be.
        """
        if self.encoders < 1:
            raise FoveateError(f"encoders must be 1 or more, got {self.encoders}")
        if self.moderation_seconds <= 0:
            raise FoveateError(f"moderation_seconds must be above 0, got {self.moderation_seconds:g}")
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(allowed_name(name) for name in self.hosts))
        if self.moderation is not None and not isinstance(self.moderation, TimedCheck):
            object.__setattr__(self, "moderation", TimedCheck(self.moderation, self.moderation_seconds))
