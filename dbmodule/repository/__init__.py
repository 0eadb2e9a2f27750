"""The repository: immutable objects that hold backups, as ``docs/format.md`` describes them."""
