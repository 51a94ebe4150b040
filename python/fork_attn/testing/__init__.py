"""Helpers for tests: plan buffers from Python lists, and the tolerance rule."""
