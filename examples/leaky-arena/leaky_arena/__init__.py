"""The block ``leaky``, the task ``last_seen`` and the measurement ``weight_norm``."""
