"""Continual adaptation of a frozen SAM to a stream of image domains."""
