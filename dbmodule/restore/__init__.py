"""Restoring: from a chain in the repository to a data directory that a server starts on."""
