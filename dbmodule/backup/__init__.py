"""Taking a backup: the protocol, the reading of files, the choice of a baseline."""
