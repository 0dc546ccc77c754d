"""Losses as pure functions of tensors.

Task losses belong to their task (`sr4ir_dist.tasks`).
"""
