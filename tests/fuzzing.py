"""How many inputs a fuzz test draws: its own count in CI, a multiple of it in a long run.

    python -m pytest tests -k fuzz --hypothesis-profile deep

The suite draws the same inputs in every run (profile "steady", `tests/conftest.py`), so a failure
is never a matter of luck; "deep" draws others each time, and twenty times as many.
"""

from __future__ import annotations

from hypothesis import settings

STEADY_EXAMPLES = 100  # of the profile that the counts of the tests refer to
DEEP_EXAMPLES = 20 * STEADY_EXAMPLES


def register_profiles() -> None:
    """Make both profiles known and choose the steady one; the command line may choose again."""
    settings.register_profile(
        "steady", derandomize=True, deadline=None, max_examples=STEADY_EXAMPLES
    )
    settings.register_profile("deep", deadline=None, max_examples=DEEP_EXAMPLES, print_blob=True)
    settings.load_profile("steady")


def draws(count: int) -> settings:
    """`count` inputs in the steady profile, more in a deeper one."""
    factor = settings.get_profile(settings.get_current_profile_name()).max_examples
    return settings(max_examples=count * factor // STEADY_EXAMPLES)
