"""Datasets of dense labels, and the contract of a sample."""
