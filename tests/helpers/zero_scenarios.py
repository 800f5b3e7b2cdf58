"""Lists what tests/distributed/deepspeed_job.py trains: ZeRO's stage, TrAct before or after DeepSpeed, micro-steps."""

STAGES = (1, 2, 3)
SCENARIOS = [(stage, when, micros) for stage in STAGES for when in ("before", "after") for micros in (1, 2)]
