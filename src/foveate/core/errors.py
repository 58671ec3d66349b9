"""Errors that foveate raises for what a caller can get wrong."""


class FoveateError(ValueError):
    """Something a caller can mend; the message says what was asked, what came and the remedy."""


class PlanConflictError(FoveateError):
    """Two policies ask for things that cannot both be done; the message names them and says why."""


class CheckpointError(FoveateError):
    """A weight file is missing, damaged or of another model; the key, shape or file is named."""


class UnsupportedError(FoveateError):
    """What was asked for exists in the field but not in this version of foveate."""


class Cancelled(Exception):  # noqa: N818 - a request to stop is not an error
    """A callback asked the engine to stop; the request's state is gone and nothing else changed."""
