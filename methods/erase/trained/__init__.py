"""Erasure by training: one file a method, one signature, one registry."""
