"""Fits reward models, for images with text and for language, to preferences and ratings."""
