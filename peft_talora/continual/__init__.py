"""Continual adaptation of SAM to a stream of domains: adapters per domain, routing, other learners, scores."""
