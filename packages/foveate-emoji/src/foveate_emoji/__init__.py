"""Folders of the demonstration models, which foveate finds through the entry points of this package."""

from pathlib import Path

EMOJI_TINY = Path(__file__).parent / "emoji-tiny"
"""A small model of the Infinity family: 9.4 M parameters, 256 x 256 pixels."""
EMOJI_EIGHT = Path(__file__).parent / "emoji-eight"
"""A test object for policies: eight drawings, ten scales, 5.4 M parameters."""
