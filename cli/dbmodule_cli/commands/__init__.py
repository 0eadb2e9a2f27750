"""One module per command, each with the click command as ``command``; imported when it is used."""
