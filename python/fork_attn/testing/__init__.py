"""Helpers for tests: plan buffers from Python lists, dense attention, and the tolerance rule."""
