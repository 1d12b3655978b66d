"""`kalshi-platform qa`: the inventory sweep of qa/mm_inventory_qa.py."""

from kalshi_platform.qa.mm_inventory_qa import command

__all__ = ["command"]
