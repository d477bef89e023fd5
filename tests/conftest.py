"""Hypothesis: equal examples in each run, and no limits of time that a busy machine would break."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "calm", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("calm")
