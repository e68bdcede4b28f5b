"""The stages in order, and the runner: claim, run, carry, checkpoint, hand on."""
