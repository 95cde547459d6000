"""Domains one after another: an adapter for each, and what chooses among them by the image."""
