"""Qwen3.5's decoder, and what alters it from outside: adapters, recomputation, sharding, a cache."""
