"""Training: objectives on one flat loop, with a state on disk that goes on bit for bit.

docs/train.md is the room's page.
"""
