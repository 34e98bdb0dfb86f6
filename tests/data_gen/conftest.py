"""Hypothesis for the tests of data_gen: no limit on time, which a slow machine would exceed."""

from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
