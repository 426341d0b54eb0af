"""Imported as a whole by image processors; text models call nothing of it."""
