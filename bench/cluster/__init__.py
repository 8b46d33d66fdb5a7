"""Emulated hosts: network namespaces with shaped NICs, and what their links really carry."""
