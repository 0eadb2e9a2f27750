"""Adapters that speak to a PostgreSQL server: its sessions, and servers started locally."""
