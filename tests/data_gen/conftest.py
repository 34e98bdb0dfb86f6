"""What tests of data_gen share: properties are checked without a limit on time, which a slow machine would miss."""

from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
