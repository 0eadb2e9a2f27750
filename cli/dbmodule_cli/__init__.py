"""The command line of dbmodule: parse → options → library call → report → text or JSON."""
