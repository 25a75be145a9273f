"""Settings of the whole suite, made before torch is imported."""

from __future__ import annotations

import os

# Servers, engines and the tests themselves share two cores: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
