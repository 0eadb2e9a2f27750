"""The data directory on disk: reading a source, writing a restore target."""
