"""The stages in order, and the runner: claim, run, carry, checkpoint, hand on."""

from jobs.pipeline.runner import Runner

__all__ = ["Runner"]
