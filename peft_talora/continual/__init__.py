"""Continual adaptation: a stream of domains, one adapter for each, and a router that knows them apart."""
