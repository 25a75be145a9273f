"""How the server is run in containers. A package for the sake of the boards' code alone.

It is not installed with the project, so the Docker SDK of the same name is hidden only from what
runs in the repository's root, where nothing uses it.
"""
