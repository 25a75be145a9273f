"""The Grafana boards as data: `python -m docker.grafana.boards` writes their JSON files.

No part of the installed package: it runs from the repository's root and imports the standard
library only.
"""
