"""Tests of dbmodule; those in ``integration`` run against real servers 15, 17 and 18."""
