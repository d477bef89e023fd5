"""Programs around the method: `python -m boxteacher.tools.NAME`."""
