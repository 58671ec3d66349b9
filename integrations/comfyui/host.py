"""What ComfyUI offers to a node while it runs: a progress bar with previews, and the cancel button."""

import comfy.model_management
import comfy.utils
from comfy.cli_args import args
from PIL import Image


class Progress:
    """The progress bar of the node that runs, with the image as it forms."""

    def __init__(self, total: int) -> None:
        """Shows nothing yet.

        Args:
            total: Steps until it is full.
        """
        self._bar = comfy.utils.ProgressBar(total)

    def show(self, done: int, image: Image.Image | None) -> None:
        """Sets the bar, and the preview if there is one.

        Raises:
            InterruptProcessingException: Somebody cancelled; ComfyUI's own exception.
        """
        check_cancelled()
        # ComfyUI encodes the preview, and makes it no larger than the user set it to.
        self._bar.update_absolute(done, preview=None if image is None else ("JPEG", image, args.preview_size))


def check_cancelled() -> None:
    """Ends the node if somebody cancelled.

    Raises:
        InterruptProcessingException: Somebody did; ComfyUI's own exception.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
