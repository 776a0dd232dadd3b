"""Performance measurements of pyllamabatch and its peers: `python -m bench --help`."""
