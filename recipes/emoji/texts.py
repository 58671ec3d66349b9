"""The text encoder of everything trained here: of the models and of the heads that judge them."""

from foveate.conditioning.minilm import TextEncoder
from foveate.families.loading import Origin, find_folder
from foveate.weights.folder import text_encoder_folder


def bundled_encoder() -> TextEncoder:
    """The text encoder that the package carries, with the rounding that users get."""
    return TextEncoder.from_folder(text_encoder_folder(find_folder(Origin(name_or_path="emoji"))))
