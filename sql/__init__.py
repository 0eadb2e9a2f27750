"""The SQL files of the extension, shipped inside the package."""
