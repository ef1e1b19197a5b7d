"""What can go wrong with images."""

from __future__ import annotations


class ImageError(Exception):
    """A layer could not be made, stored or found. The message is a sentence for people."""


class RecipeError(ImageError):
    """A recipe is missing, or one of its values cannot be used."""


class BuildFailed(ImageError):
    """A step of a build ended with an error; the message carries the end of its output."""
