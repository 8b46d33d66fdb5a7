"""Whole models at full size, from a trainer's layout to a server's: what planning costs, and what would travel."""
